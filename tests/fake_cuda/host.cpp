// The product's kernels, compiled for the host: one line for each.
#include "../../src/backend/cuda/kernels/attention.cu"
#include "../../src/backend/cuda/kernels/attention_mma.cu"
#include "../../src/backend/cuda/kernels/choose.cu"
#include "../../src/backend/cuda/kernels/elementwise.cu"
#include "../../src/backend/cuda/kernels/matmul.cu"
#include "../../src/backend/cuda/kernels/mma_few.cu"
#include "../../src/backend/cuda/kernels/mma_many.cu"
#include "../../src/backend/cuda/kernels/norm.cu"
#include "../../src/backend/cuda/kernels/quantize.cu"

FAKE_CUDA_KERNEL(activate);
FAKE_CUDA_KERNEL(attend_1);
FAKE_CUDA_KERNEL(attend_4);
FAKE_CUDA_KERNEL(attend_many_64);
FAKE_CUDA_KERNEL(attend_many_128);
FAKE_CUDA_KERNEL(attend_many_256);
FAKE_CUDA_KERNEL(cut);
FAKE_CUDA_KERNEL(draw);
FAKE_CUDA_KERNEL(embed);
FAKE_CUDA_KERNEL(few_bf16);
FAKE_CUDA_KERNEL(few_f16);
FAKE_CUDA_KERNEL(few_f32);
FAKE_CUDA_KERNEL(few_int4);
FAKE_CUDA_KERNEL(few_int8);
FAKE_CUDA_KERNEL(few_nl4);
FAKE_CUDA_KERNEL(gather);
FAKE_CUDA_KERNEL(largest);
FAKE_CUDA_KERNEL(many_bf16);
FAKE_CUDA_KERNEL(many_f16);
FAKE_CUDA_KERNEL(many_f32);
FAKE_CUDA_KERNEL(many_int4);
FAKE_CUDA_KERNEL(many_int8);
FAKE_CUDA_KERNEL(many_nl4);
FAKE_CUDA_KERNEL(mma_few_int4);
FAKE_CUDA_KERNEL(mma_few_int8);
FAKE_CUDA_KERNEL(mma_few_nl4);
FAKE_CUDA_KERNEL(mma_many_bf16_64);
FAKE_CUDA_KERNEL(mma_many_bf16_128);
FAKE_CUDA_KERNEL(mma_many_f16_64);
FAKE_CUDA_KERNEL(mma_many_f16_128);
FAKE_CUDA_KERNEL(mma_many_int4_64);
FAKE_CUDA_KERNEL(mma_many_int4_128);
FAKE_CUDA_KERNEL(mma_many_int8_64);
FAKE_CUDA_KERNEL(mma_many_int8_128);
FAKE_CUDA_KERNEL(mma_many_nl4_64);
FAKE_CUDA_KERNEL(mma_many_nl4_128);
FAKE_CUDA_KERNEL(normalize);
FAKE_CUDA_KERNEL(quantize_int4);
FAKE_CUDA_KERNEL(quantize_int8);
FAKE_CUDA_KERNEL(quantize_nl4);
FAKE_CUDA_KERNEL(rotate_and_store);
FAKE_CUDA_KERNEL(scatter_add);
