#include "soft_attention_cuda.h"

namespace attncap {
ATTNCAP_INSTANTIATE_SOFT_ATTENTION(bfloat16)
}  // namespace attncap
