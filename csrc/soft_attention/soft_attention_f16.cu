#include "soft_attention_cuda.h"

namespace attncap {
ATTNCAP_INSTANTIATE_SOFT_ATTENTION(float16)
}  // namespace attncap
