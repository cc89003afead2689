// A CUDA driver that loads nothing and launches nothing, and remembers what it was asked to launch.
#include <cuda.h>

struct Launch {
  unsigned grid[3], threads;
  CUstream stream;
  CUfunction function;
  CUdeviceptr pointers[4];  // the kernel's first arguments
};

static struct Launch last;
static unsigned launches;

unsigned fake_launches(void) { return launches; }
const struct Launch* fake_last_launch(void) { return &last; }

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters,
                          void** extra) {
  (void)extra;
  last = (struct Launch){{config->gridDimX, config->gridDimY, config->gridDimZ},
                         config->blockDimX,
                         config->hStream,
                         function,
                         {0}};
  for (int i = 0; i < 4; ++i) last.pointers[i] = *(CUdeviceptr*)parameters[i];
  ++launches;
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  *module = (CUmodule)image;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  (void)name;
  *function = (CUfunction)module;  // one a module
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  (void)function;
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  (void)attribute, (void)device;
  *value = 65536;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void* data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  (void)attribute;
  *(CUdeviceptr*)data = pointer;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char** text) {
  (void)error;
  *text = "no error";
  return CUDA_SUCCESS;
}

// Triton's drivers of 3.6 to 3.9 link these, and launch our kernels without.
CUresult fake_unsupported(void) { return CUDA_ERROR_NOT_SUPPORTED; }
#define UNSUPPORTED(name) __asm__(".globl " name "\n.set " name ", fake_unsupported");
UNSUPPORTED("cuCtxGetDevice")
UNSUPPORTED("cuCtxGetLimit")
UNSUPPORTED("cuCtxSetCurrent")
UNSUPPORTED("cuCtxSetLimit")
UNSUPPORTED("cuDeviceGet")
UNSUPPORTED("cuDevicePrimaryCtxRetain")
UNSUPPORTED("cuDriverGetVersion")
UNSUPPORTED("cuFuncSetAttribute")
UNSUPPORTED("cuFuncSetCacheConfig")
UNSUPPORTED("cuModuleUnload")
UNSUPPORTED("cuStreamIsCapturing")
