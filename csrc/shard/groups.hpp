// The groups of a center's arrays: the arrays of one have a rule with hyper-parameters of their own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "mpi/error.hpp"
#include "shard/layout.hpp"

namespace hvd_agn {

/// A rule for each group. All keep the same slots, and agree in what concerns a whole push or block.
class Groups {
 public:
  /// `of`: group of each segment.
  Groups(std::vector<Rule> rules, std::vector<std::uint32_t> of) : rules_(std::move(rules)), of_(std::move(of)) {
    HVD_AGN_EXPECTS(!rules_.empty(), std::invalid_argument, "no rule");
    for (const std::uint32_t group : of_)
      HVD_AGN_EXPECTS(group < rules_.size(), std::invalid_argument, "there is no group ", group);
    for (const Rule& rule : rules_) {
      follow_ |= rule.follow;
      HVD_AGN_EXPECTS(rule.kind == common().kind && rule.slots() == common().slots(), std::invalid_argument,
                      "the groups' rules keep different slots");
    }
  }

  std::size_t size() const { return rules_.size(); }
  /// For what is the same in all: slots, staged(), pushes_values(), weight(), clip_norm, gap_aware.
  const Rule& common() const { return rules_.front(); }
  /// Segments that are in a group.
  std::size_t segments() const { return of_.size(); }
  /// For the arithmetic.
  const Rule& rule(const Layout::Part& part) const { return rules_[of_[part.segment]]; }
  /// Learning rates that a push brings: one per group, or none.
  std::size_t rates() const { return follow_ ? rules_.size() : 0; }
  /// The push as it is for this part. `rates`: as many as rates().
  Push push(Push push, const Layout::Part& part, const std::vector<double>& rates) const {
    if (follow_) push.lr = rates[of_[part.segment]];
    return push;
  }

 private:
  std::vector<Rule> rules_;
  std::vector<std::uint32_t> of_;
  bool follow_ = false;
};

}  // namespace hvd_agn
