// One error of each kind that compute-sanitizer is asked for, in a kernel named as the extension's are: gpu_check.sh
// runs it first, because a tool that checks nothing finds nothing.
//
//     planted_errors memcheck | racecheck | initcheck | none
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>

namespace locallip::cuda {

constexpr int kThreads = 64;

__global__ void writes_outside(float* out) { out[threadIdx.x + 1] = 1; }

__global__ void forgets_a_barrier(float* out) {
  __shared__ float shared[kThreads];
  shared[threadIdx.x] = static_cast<float>(threadIdx.x);
  out[threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
}

__global__ void doubles(float* values) { values[threadIdx.x] *= 2; }

}  // namespace locallip::cuda

int main(int count, char** arguments) {
  using namespace locallip::cuda;
  const char* wanted = count == 2 ? arguments[1] : "";
  float* values = nullptr;
  if (cudaMalloc(&values, kThreads * sizeof(float)) != cudaSuccess) {
    std::fprintf(stderr, "planted_errors: no device memory\n");
    return 2;
  }
  if (!std::strcmp(wanted, "memcheck")) {
    writes_outside<<<1, kThreads>>>(values);
  } else if (!std::strcmp(wanted, "racecheck")) {
    forgets_a_barrier<<<1, kThreads>>>(values);
  } else if (!std::strcmp(wanted, "initcheck")) {
    doubles<<<1, kThreads>>>(values);
  } else if (!std::strcmp(wanted, "none")) {
    cudaMemset(values, 0, kThreads * sizeof(float));
    doubles<<<1, kThreads>>>(values);
  } else {
    std::fprintf(stderr, "usage: planted_errors memcheck | racecheck | initcheck | none\n");
    return 2;
  }
  cudaDeviceSynchronize();
  cudaFree(values);
  return 0;
}
