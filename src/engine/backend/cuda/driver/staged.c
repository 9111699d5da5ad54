// A driver without a GPU, for tests: device memory is host memory, and a launch writes down what it was given. It refuses
// what the environment asks it to refuse.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef unsigned long long Address;
enum { OUT_OF_MEMORY = 2, INVALID_IMAGE = 200, NO_BINARY = 209, ILLEGAL_ADDRESS = 700 };

static int allocations, modules, launches;
static int staged(const char* name) { return getenv(name) != 0; }

int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int* version) { return *version = 13000, 0; }
int cuDeviceGetCount(int* count) { return *count = 1, 0; }
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, 0; }
int cuDeviceGetName(char* name, int len, int device) { return strncpy(name, "Staged GPU", len), 0; }
int cuDeviceTotalMem_v2(size_t* bytes, int device) { return *bytes = (size_t)8 << 30, 0; }
int cuDeviceGetAttribute(int* value, int which, int device) {
    return *value = which == 75 ? 9 : which == 115 ? !staged("NO_POOL") : 0, 0;
}
int cuGetErrorString(int error, const char** words) { return *words = "as staged", 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) { return *context = &allocations, 0; }
int cuDevicePrimaryCtxRelease_v2(int device) {
    return printf("released with %d allocations, %d modules\n", allocations, modules), 0;
}
int cuCtxSetCurrent(void* context) { return 0; }
int cuStreamCreate(void** stream, unsigned flags) { return *stream = &launches, 0; }
int cuStreamDestroy_v2(void* stream) { return 0; }
int cuStreamSynchronize(void* stream) { return launches && staged("BAD_KERNEL") ? ILLEGAL_ADDRESS : 0; }

int cuDeviceGetDefaultMemPool(void** pool, int device) { return *pool = &modules, 0; }
int cuMemPoolSetAttribute(void* pool, int which, Address* value) { return which == 4 && *value == -1ull ? 0 : 1; }
int cuMemPoolTrimTo(void* pool, size_t bytes) { return printf("trimmed\n"), 0; }
static int allocate(Address* address, size_t bytes) {
    if (bytes > (size_t)8 << 30) return OUT_OF_MEMORY;
    allocations++;
    return *address = (Address)malloc(bytes), 0;
}
static int release(Address address) { return allocations--, free((void*)address), 0; }
int cuMemAllocAsync(Address* address, size_t bytes, void* stream) { return allocate(address, bytes); }
int cuMemAlloc_v2(Address* address, size_t bytes) { return printf("plain\n"), allocate(address, bytes); }
int cuMemFreeAsync(Address address, void* stream) { return release(address); }
int cuMemFree_v2(Address address) { return release(address); }
int cuMemcpyHtoDAsync_v2(Address to, void* from, size_t bytes, void* stream) { return memcpy((void*)to, from, bytes), 0; }
int cuMemcpyDtoHAsync_v2(void* to, Address from, size_t bytes, void* stream) { return memcpy(to, (void*)from, bytes), 0; }
int cuMemcpyDtoDAsync_v2(Address to, Address from, size_t bytes, void* stream) {
    return memcpy((void*)to, (void*)from, bytes), 0;
}
int cuMemsetD8Async(Address to, unsigned char byte, size_t bytes, void* stream) { return memset((void*)to, byte, bytes), 0; }

int cuModuleLoadData(void** module, const char* image) {
    const int code = !memcmp(image, "\177ELF", 4);
    if (code && staged("OLD_DRIVER")) return NO_BINARY;
    if (!code && memcmp(image, ".version 7.4", 12)) return INVALID_IMAGE;
    __sync_fetch_and_add(&modules, 1);
    return *module = (void*)(code ? "code" : "text"), 0;
}
int cuModuleUnload(void* module) { return modules--, 0; }
struct Kernel { const char *name, *module; };
int cuModuleGetFunction(void** function, const char* module, const char* name) {
    struct Kernel* kernel = malloc(sizeof *kernel);
    kernel->name = strdup(name);
    kernel->module = module;
    return *function = kernel, 0;
}
int cuFuncSetAttribute(struct Kernel* kernel, int which, int value) {
    return printf("%s: attribute %d = %d\n", kernel->name, which, value), 0;
}
int cuLaunchKernel(struct Kernel* kernel, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** p, void** extra) {
    launches++;
    printf("%s of %s: %u %u %u, %u %u %u, %u", kernel->name, kernel->module, gx, gy, gz, bx, by, bz, shared);
    if (!strcmp(kernel->name, "scale")) printf(": %llu %g %lld", *(Address*)p[0], *(float*)p[1], *(long long*)p[2]);
    if (!strcmp(kernel->name, "rope")) printf(": %llu %d", *(Address*)p[3], *(int*)p[4]);
    return printf("\n"), 0;
}
