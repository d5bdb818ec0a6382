#include <atomic>
#include <cstring>
#include <vector>

#include "kernels/kernels.hpp"

namespace hvd_agn {

namespace baseline {
extern const Kernels set;
}

#if defined(HVD_AGN_HAVE_AVX2)
namespace avx2 {
extern const Kernels set;
}
#endif

namespace {

/// Best first.
std::vector<const Kernels*> available() {
  std::vector<const Kernels*> sets;
#if defined(HVD_AGN_HAVE_AVX2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) sets.push_back(&avx2::set);
#endif
  sets.push_back(&baseline::set);
  return sets;
}

std::atomic<const Kernels*> in_use{available().front()};

}  // namespace

const Kernels& kernels() {
  return *in_use.load(std::memory_order_relaxed);
}

bool use_kernels(const char* name) {
  for (const Kernels* set : available()) {
    if (std::strcmp(name, set->name) != 0) continue;
    in_use.store(set);
    return true;
  }
  return false;
}

}  // namespace hvd_agn
