#include "kernels.hpp"

namespace hvd_agn {

namespace baseline {
extern const Kernels set;
}

#if defined(HVD_AGN_HAVE_AVX2)
namespace avx2 {
extern const Kernels set;
}
#endif

const Kernels& kernels() {
#if defined(HVD_AGN_HAVE_AVX2)
  static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  if (has_avx2) return avx2::set;
#endif
  return baseline::set;
}

}  // namespace hvd_agn
