// A null GPU: the CUDA driver and the CUDA runtime as far as torch and Triton call them, without a device.
//
// Preloaded as libcuda.so.1 under the CUDA build of torch. Memory is host memory that only copies touch. Kernels are
// not executed: their launches are checked against the limits of an H100 and counted by name. Streams, events and
// captures keep CUDA's rules. What libraries (cuBLAS, cuDNN, NCCL) export is written by build.py. Scalars read from the
// device are set: a condition (`if tensor:`, torch.equal of equal shapes, assert_close) holds, `any` finds nothing, a
// number is 0.
//
// Environment: NULLGPU_DEVICES (1), NULLGPU_MEMORY_GB (85, decimal), NULLGPU_VERBOSE (0; 1 says what is refused).

#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <elf.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#if CUDART_VERSION < 13000
#error "the headers of CUDA 13 are needed: their versions of the functions are those defined here"
#endif

#define API __attribute__((visibility("default")))
#define SMALL_COPY (1l << 20)  // bytes; larger copies within the device and larger fills leave memory untouched
#define LARGE_COPY (64l << 20) // bytes; larger copies between host and device do
#define MAX_DEVICES 16
#define MAX_STREAMS 4096

static pthread_mutex_t lock = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;

static long setting(const char *name, long otherwise) {
    const char *text = getenv(name);
    return text && *text ? atol(text) : otherwise;
}

static void say(const char *format, ...) {
    static atomic_int verbose = -1;
    if (verbose < 0) verbose = setting("NULLGPU_VERBOSE", 0) != 0;
    if (!verbose) return;
    va_list values;
    va_start(values, format);
    fputs("[null GPU] ", stderr);
    vfprintf(stderr, format, values);
    fputc('\n', stderr);
    va_end(values);
}

// ---- errors: the last one is kept per thread, as the runtime does -------------------------------------------------

static __thread cudaError_t last_error;

static cudaError_t result(cudaError_t error) {
    if (error) last_error = error;
    return error;
}

API cudaError_t cudaGetLastError(void) {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

API cudaError_t cudaPeekAtLastError(void) { return last_error; }

API const char *cudaGetErrorString(cudaError_t error) {
    static __thread char text[64];
    if (error == cudaErrorMemoryAllocation) return "out of memory";
    snprintf(text, sizeof text, "null GPU error %d", error);
    return text;
}

API const char *cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }

API CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = cudaGetErrorString((cudaError_t)error);
    return CUDA_SUCCESS;
}

API CUresult cuGetErrorName(CUresult error, const char **text) { return cuGetErrorString(error, text); }

// ---- counting -----------------------------------------------------------------------------------------------------

enum {
    LAUNCHES,        // kernels and fills, outside a graph or while it is recorded
    COPIES,          // of any direction
    COPIES_H2D,      // from the host
    COPIES_D2H,      // to the host
    COPIES_PAGEABLE, // asynchronous copies of host memory that is not pinned: the driver may wait for the stream
    SYNCS,           // the host waits for a stream or the device
    EVENT_SYNCS,     // the host waits for an event
    GRAPH_LAUNCHES,  // graphs replayed
    GRAPH_NODES,     // launches and copies within them
    OUTSIDE_CAPTURE, // work on another stream by the thread that is recording a graph
    COUNTERS,
};
static const char *COUNTER_NAMES[COUNTERS] = {
    "launches", "copies",      "copies_h2d",     "copies_d2h",  "copies_pageable",
    "syncs",    "event_syncs", "graph_launches", "graph_nodes", "outside_capture",
};
static atomic_long counters[COUNTERS];

struct kernel {
    const char *name;
    int registers, local_bytes; // of a thread; 0 where they are not known
    atomic_long launches;
    atomic_int listed;
    struct kernel *next;
};
static struct kernel *_Atomic launched; // all kernels that were ever launched
static __thread struct kernel *last_kernel;

static void count_kernel(struct kernel *kernel) {
    counters[LAUNCHES]++;
    kernel->launches++;
    last_kernel = kernel;
    if (!kernel->listed && !atomic_exchange(&kernel->listed, 1)) {
        kernel->next = launched;
        while (!atomic_compare_exchange_weak(&launched, &kernel->next, kernel)) continue;
    }
}

// Whether a condition holds that the host reads: comparisons and `all` do; `any` (torch's kernel reduces with `or`)
// finds nothing, and a number, which is 0, that is converted to a condition is false.
static int condition_holds(void) {
    const char *name = last_kernel ? last_kernel->name : "";
    return !strstr(name, "or_kernel_cuda") && !strstr(name, "direct_copy_kernel");
}

// Sets all counters to 0.
API void null_reset(void) {
    for (int i = 0; i < COUNTERS; i++) counters[i] = 0;
    for (struct kernel *kernel = launched; kernel; kernel = kernel->next) kernel->launches = 0;
}

// Returns a counter; -1 for an unknown name.
API long null_get(const char *name) {
    for (int i = 0; i < COUNTERS; i++)
        if (!strcmp(name, COUNTER_NAMES[i])) return counters[i];
    return -1;
}

// Returns the name of the i-th counter; NULL after the last.
API const char *null_counter(int i) { return i < COUNTERS ? COUNTER_NAMES[i] : NULL; }

// Returns the name of the i-th kernel and how often it was launched since the reset; NULL after the last.
API const char *null_kernel(int i, long *launches) {
    struct kernel *kernel = launched;
    while (kernel && i--) kernel = kernel->next;
    if (kernel) *launches = kernel->launches;
    return kernel ? kernel->name : NULL;
}

// ---- devices ------------------------------------------------------------------------------------------------------

static __thread int device;
static atomic_long used_bytes[MAX_DEVICES];

static int devices(void) {
    long count = setting("NULLGPU_DEVICES", 1);
    return count < 0 ? 0 : count > MAX_DEVICES ? MAX_DEVICES : count;
}

static size_t memory_bytes(void) { return 1000000000ul * setting("NULLGPU_MEMORY_GB", 85); }

static int attribute(int what) {
    switch (what) {
    case cudaDevAttrComputeCapabilityMajor: return setting("NULLGPU_CAPABILITY", 90) / 10;
    case cudaDevAttrComputeCapabilityMinor: return setting("NULLGPU_CAPABILITY", 90) % 10;
    case cudaDevAttrMultiProcessorCount: return 132;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMaxThreadsPerBlock: return 1024;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return 232448;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return 233472;
    case cudaDevAttrMaxRegistersPerBlock: return 65536;
    case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
    case cudaDevAttrClockRate: return 1980000;
    case cudaDevAttrMemoryClockRate: return 2619000;
    case cudaDevAttrGlobalMemoryBusWidth: return 5120;
    case cudaDevAttrL2CacheSize: return 52428800;
    case cudaDevAttrConcurrentKernels: return 1;
    case cudaDevAttrUnifiedAddressing: return 1;
    case cudaDevAttrCanMapHostMemory: return 1;
    case cudaDevAttrCooperativeLaunch: return 1;
    default: return 0;
    }
}

API cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int index) {
    if (index < 0 || index >= devices()) return result(cudaErrorInvalidDevice);
    memset(p, 0, sizeof *p);
    // nothing that was measured here may be taken for a measurement of that device
    strcpy(p->name, "Null GPU (H100)");
    p->totalGlobalMem = memory_bytes();
    p->totalConstMem = 65536;
    p->major = attribute(cudaDevAttrComputeCapabilityMajor);
    p->minor = attribute(cudaDevAttrComputeCapabilityMinor);
    p->multiProcessorCount = attribute(cudaDevAttrMultiProcessorCount);
    p->warpSize = 32;
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->maxThreadsPerMultiProcessor = attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
    p->maxBlocksPerMultiProcessor = attribute(cudaDevAttrMaxBlocksPerMultiprocessor);
    p->sharedMemPerBlock = attribute(cudaDevAttrMaxSharedMemoryPerBlock);
    p->sharedMemPerBlockOptin = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
    p->sharedMemPerMultiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    p->regsPerBlock = attribute(cudaDevAttrMaxRegistersPerBlock);
    p->regsPerMultiprocessor = attribute(cudaDevAttrMaxRegistersPerMultiprocessor);
    p->l2CacheSize = attribute(cudaDevAttrL2CacheSize);
    p->memoryBusWidth = attribute(cudaDevAttrGlobalMemoryBusWidth);
    p->concurrentKernels = p->unifiedAddressing = p->canMapHostMemory = p->cooperativeLaunch = 1;
    p->managedMemory = 1;
    p->texturePitchAlignment = 32;
    p->textureAlignment = 512;
    p->pciBusID = index;
    return cudaSuccess;
}

API cudaError_t cudaGetDeviceCount(int *count) {
    *count = devices();
    return result(*count ? cudaSuccess : cudaErrorNoDevice);
}

API cudaError_t cudaGetDevice(int *index) {
    *index = device;
    return cudaSuccess;
}

API cudaError_t cudaSetDevice(int index) {
    if (index < 0 || index >= devices()) return result(cudaErrorInvalidDevice);
    device = index;
    return cudaSuccess;
}

API cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr what, int index) {
    *value = attribute(what);
    return cudaSuccess;
}

API cudaError_t cudaDriverGetVersion(int *version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}

API cudaError_t cudaRuntimeGetVersion(int *version) { return cudaDriverGetVersion(version); }

API cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return cudaSuccess;
}

API cudaError_t cudaDeviceCanAccessPeer(int *can, int from, int to) {
    *can = 0;
    return cudaSuccess;
}

API cudaError_t cudaDeviceGetPCIBusId(char *text, int length, int index) {
    snprintf(text, length, "0000:%02x:00.0", index);
    return cudaSuccess;
}

// ---- streams, events and the rules of capture ---------------------------------------------------------------------

struct stream {
    int id, priority;
    int capture;      // number of the capture it takes part in; 0: none
    long work, ended; // operations so far; the number at the last event that another stream of the capture awaits
};
struct event {
    struct stream *stream;
    int recorded, capture;
    long work; // operations of its stream before it
    double ms;
};
struct graph {
    long nodes;
};

static struct stream default_stream, *streams[MAX_STREAMS];
static atomic_int stream_count;

// one capture at a time
static struct {
    struct stream *origin; // NULL: nothing is recorded
    enum cudaStreamCaptureMode mode;
    pthread_t thread;
    int number;
    cudaError_t invalid; // why it cannot be ended well
    long nodes;
} capture;
static __thread enum cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

static struct stream *stream_of(cudaStream_t handle) {
    int is_default = handle == NULL || handle == cudaStreamLegacy || handle == cudaStreamPerThread;
    return is_default ? &default_stream : (struct stream *)handle;
}

static int recording_here(void) { return capture.origin && pthread_equal(capture.thread, pthread_self()); }

static cudaError_t invalidate(cudaError_t error, const char *call) {
    say("%s: error %d, not allowed in a capture", call, error);
    if (capture.origin) capture.invalid = error;
    return result(error);
}

// what may wait for other work must not be called while a graph is recorded, unless a thread has relaxed its mode
static cudaError_t unsafe(const char *call) {
    if (!capture.origin || thread_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
    int mine = recording_here() && capture.mode != cudaStreamCaptureModeRelaxed;
    int any = thread_mode == cudaStreamCaptureModeGlobal && capture.mode == cudaStreamCaptureModeGlobal;
    return mine || any ? invalidate(cudaErrorStreamCaptureUnsupported, call) : cudaSuccess;
}

static void enqueue(struct stream *stream, const char *what) {
    stream->work++;
    if (capture.origin && stream->capture) {
        capture.nodes++;
    } else if (recording_here()) {
        counters[OUTSIDE_CAPTURE]++;
        say("%s on stream %d, outside the capture", what, stream->id);
    }
}

static double now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}

API cudaError_t cudaStreamCreateWithPriority(cudaStream_t *handle, unsigned flags, int priority) {
    struct stream *stream = calloc(1, sizeof *stream);
    stream->priority = priority;
    stream->id = ++stream_count;
    if (stream->id > MAX_STREAMS) return result(cudaErrorMemoryAllocation);
    streams[stream->id - 1] = stream;
    *handle = (cudaStream_t)stream;
    return cudaSuccess;
}

API cudaError_t cudaStreamCreateWithFlags(cudaStream_t *handle, unsigned flags) {
    return cudaStreamCreateWithPriority(handle, flags, 0);
}

API cudaError_t cudaStreamCreate(cudaStream_t *handle) { return cudaStreamCreateWithPriority(handle, 0, 0); }

API cudaError_t cudaStreamGetPriority(cudaStream_t handle, int *priority) {
    *priority = stream_of(handle)->priority;
    return cudaSuccess;
}

API cudaError_t cudaStreamQuery(cudaStream_t handle) {
    int recorded = stream_of(handle)->capture;
    return recorded ? invalidate(cudaErrorStreamCaptureUnsupported, "cudaStreamQuery") : cudaSuccess;
}

API cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
    if (stream_of(handle)->capture) return invalidate(cudaErrorStreamCaptureUnsupported, "cudaStreamSynchronize");
    counters[SYNCS]++;
    return cudaSuccess;
}

API cudaError_t cudaDeviceSynchronize(void) {
    cudaError_t error = unsafe("cudaDeviceSynchronize");
    counters[SYNCS]++;
    return error;
}

API cudaError_t cudaStreamIsCapturing(cudaStream_t handle, enum cudaStreamCaptureStatus *status) {
    *status = stream_of(handle)->capture ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, enum cudaStreamCaptureStatus *status,
                                         unsigned long long *id, cudaGraph_t *graph, const cudaGraphNode_t **nodes,
                                         const cudaGraphEdgeData **edges, size_t *count) {
    static struct graph unfinished;
    cudaStreamIsCapturing(handle, status);
    if (id) *id = stream_of(handle)->capture;
    if (graph) *graph = (cudaGraph_t)&unfinished;
    if (nodes) *nodes = NULL;
    if (edges) *edges = NULL;
    if (count) *count = 0;
    return cudaSuccess;
}

API cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
    enum cudaStreamCaptureMode before = thread_mode;
    thread_mode = *mode;
    *mode = before;
    return cudaSuccess;
}

API cudaError_t cudaStreamBeginCapture(cudaStream_t handle, enum cudaStreamCaptureMode mode) {
    static int number;
    struct stream *stream = stream_of(handle);
    if (stream == &default_stream || capture.origin) return result(cudaErrorStreamCaptureUnsupported);
    capture.mode = mode;
    capture.thread = pthread_self();
    capture.number = stream->capture = ++number;
    capture.invalid = cudaSuccess;
    capture.nodes = 0;
    capture.origin = stream;
    say("capture %d begins on stream %d", number, stream->id);
    return cudaSuccess;
}

API cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t *graph) {
    struct stream *origin = stream_of(handle);
    cudaError_t error = capture.invalid ? cudaErrorStreamCaptureInvalidated : cudaSuccess;
    if (origin != capture.origin) error = cudaErrorStreamCaptureUnmatched;
    for (int i = 0; i < stream_count; i++) {
        struct stream *stream = streams[i];
        if (!stream || !stream->capture) continue;
        if (stream != origin && stream->work != stream->ended) {
            say("the capture ends before stream %d was joined", stream->id);
            error = cudaErrorStreamCaptureUnjoined;
        }
        stream->capture = 0;
    }
    capture.origin = NULL;
    struct graph *made = error ? NULL : malloc(sizeof *made);
    if (made) made->nodes = capture.nodes;
    *graph = (cudaGraph_t)made;
    say("capture %d ends with error %d, %ld nodes", capture.number, error, capture.nodes);
    return result(error);
}

API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long flags) {
    struct graph *copy = malloc(sizeof *copy);
    *copy = *(struct graph *)graph;
    *exec = (cudaGraphExec_t)copy;
    return cudaSuccess;
}

API cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t handle) {
    counters[GRAPH_LAUNCHES]++;
    counters[GRAPH_NODES] += ((struct graph *)exec)->nodes;
    enqueue(stream_of(handle), "cudaGraphLaunch");
    return cudaSuccess;
}

API cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
    *count = ((struct graph *)graph)->nodes;
    return cudaSuccess;
}

API cudaError_t cudaEventCreateWithFlags(cudaEvent_t *handle, unsigned flags) {
    *handle = calloc(1, sizeof(struct event));
    return cudaSuccess;
}

API cudaError_t cudaEventCreate(cudaEvent_t *handle) { return cudaEventCreateWithFlags(handle, 0); }

API cudaError_t cudaEventDestroy(cudaEvent_t handle) {
    free(handle);
    return cudaSuccess;
}

API cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t to, unsigned flags) {
    struct event *event = (struct event *)handle;
    struct stream *stream = stream_of(to);
    int external = flags & cudaEventRecordExternal;
    *event = (struct event){stream, 1, external ? 0 : stream->capture, stream->work, now_ms()};
    return cudaSuccess;
}

API cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t to) { return cudaEventRecordWithFlags(handle, to, 0); }

static int recorded_in_this_capture(const struct event *event) {
    return capture.origin && event->capture && event->capture == capture.number;
}

API cudaError_t cudaEventQuery(cudaEvent_t handle) {
    int captured = recorded_in_this_capture((struct event *)handle);
    return captured ? invalidate(cudaErrorCapturedEvent, "cudaEventQuery") : cudaSuccess;
}

API cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
    if (recorded_in_this_capture((struct event *)handle)) {
        return invalidate(cudaErrorCapturedEvent, "cudaEventSynchronize");
    }
    counters[EVENT_SYNCS]++;
    return cudaSuccess;
}

API cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to) {
    struct event *a = (struct event *)from, *b = (struct event *)to;
    if (!a->recorded || !b->recorded) return result(cudaErrorInvalidResourceHandle);
    double gap = b->ms - a->ms;
    // no two times are equal on a device
    *ms = gap >= 0 && gap < 0.001 ? 0.001 : gap;
    return cudaSuccess;
}

API cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t awaited, unsigned flags) {
    struct event *event = (struct event *)awaited;
    struct stream *stream = stream_of(handle);
    if (!event->recorded) return cudaSuccess;
    if (recorded_in_this_capture(event)) {
        if (!stream->capture) {
            stream->capture = capture.number;
            stream->ended = stream->work;
            say("stream %d joins the capture", stream->id);
        }
        if (event->stream != stream) event->stream->ended = event->work;
    } else if (stream->capture && !(flags & cudaEventWaitExternal)) {
        return invalidate(cudaErrorStreamCaptureIsolation, "cudaStreamWaitEvent (an event from outside the capture)");
    }
    return cudaSuccess;
}

API cudaError_t cudaStreamAddCallback(cudaStream_t handle, cudaStreamCallback_t call, void *data, unsigned flags) {
    call(handle, cudaSuccess, data);
    return cudaSuccess;
}

API cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t call, void *data) {
    call(data);
    return cudaSuccess;
}

// ---- memory -------------------------------------------------------------------------------------------------------

enum { PAGEABLE, DEVICE, PINNED };
struct region {
    char *start;
    size_t bytes;
    int kind, device;
};
static struct region *regions; // by address
static size_t region_count, region_room;

static size_t pages(size_t bytes) { return ((bytes ? bytes : 1) + 4095) & ~4095ul; }

// index of the first region that ends after p
static size_t region_after(const void *p) {
    size_t low = 0, high = region_count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (regions[middle].start + regions[middle].bytes > (char *)p) high = middle;
        else low = middle + 1;
    }
    return low;
}

static void add_region(void *p, size_t bytes, int kind) {
    pthread_mutex_lock(&lock);
    if (region_count == region_room) {
        region_room = region_room ? 2 * region_room : 1024;
        regions = realloc(regions, region_room * sizeof *regions);
    }
    size_t i = region_after(p);
    memmove(regions + i + 1, regions + i, (region_count++ - i) * sizeof *regions);
    regions[i] = (struct region){p, bytes, kind, device};
    pthread_mutex_unlock(&lock);
}

static struct region find_region(const void *p) {
    pthread_mutex_lock(&lock);
    size_t i = region_after(p);
    int inside = i < region_count && regions[i].start <= (char *)p;
    struct region found = inside ? regions[i] : (struct region){0};
    pthread_mutex_unlock(&lock);
    return found;
}

static struct region remove_region(void *p) {
    pthread_mutex_lock(&lock);
    size_t i = region_after(p);
    struct region found = {0};
    if (i < region_count && regions[i].start == p) {
        found = regions[i];
        memmove(regions + i, regions + i + 1, (--region_count - i) * sizeof *regions);
    }
    pthread_mutex_unlock(&lock);
    return found;
}

static void *map_memory(size_t bytes, int kind) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void *p = mmap(NULL, pages(bytes), PROT_READ | PROT_WRITE, flags, -1, 0);
    if (p == MAP_FAILED) return NULL;
    add_region(p, pages(bytes), kind);
    return p;
}

static void unmap_memory(void *p) {
    struct region region = remove_region(p);
    if (!region.start) return;
    if (region.kind == DEVICE) used_bytes[region.device] -= region.bytes;
    munmap(p, region.bytes);
}

API cudaError_t cudaMalloc(void **p, size_t bytes) {
    cudaError_t error = unsafe("cudaMalloc");
    *p = NULL;
    if (error) return error;
    if (used_bytes[device] + pages(bytes) > memory_bytes()) return result(cudaErrorMemoryAllocation);
    *p = map_memory(bytes, DEVICE);
    if (!*p) return result(cudaErrorMemoryAllocation);
    used_bytes[device] += pages(bytes);
    return cudaSuccess;
}

API cudaError_t cudaMallocAsync(void **p, size_t bytes, cudaStream_t handle) { return cudaMalloc(p, bytes); }

API cudaError_t cudaFree(void *p) {
    cudaError_t error = p ? unsafe("cudaFree") : cudaSuccess;
    if (p && !error) unmap_memory(p);
    return error;
}

API cudaError_t cudaFreeAsync(void *p, cudaStream_t handle) { return cudaFree(p); }

API cudaError_t cudaHostAlloc(void **p, size_t bytes, unsigned flags) {
    cudaError_t error = unsafe("cudaHostAlloc");
    *p = error ? NULL : map_memory(bytes, PINNED);
    return error ? error : result(*p ? cudaSuccess : cudaErrorMemoryAllocation);
}

API cudaError_t cudaFreeHost(void *p) {
    cudaError_t error = unsafe("cudaFreeHost");
    if (!error) unmap_memory(p);
    return error;
}

API cudaError_t cudaHostRegister(void *p, size_t bytes, unsigned flags) {
    add_region(p, bytes, PINNED);
    return cudaSuccess;
}

API cudaError_t cudaHostUnregister(void *p) {
    remove_region(p);
    return cudaSuccess;
}

API cudaError_t cudaHostGetDevicePointer(void **seen, void *p, unsigned flags) {
    *seen = p;
    return cudaSuccess;
}

API cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
    *total = memory_bytes();
    *available = *total - used_bytes[device];
    return cudaSuccess;
}

API cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
    static const enum cudaMemoryType TYPES[] = {cudaMemoryTypeUnregistered, cudaMemoryTypeDevice, cudaMemoryTypeHost};
    struct region region = find_region(p);
    memset(a, 0, sizeof *a);
    a->type = TYPES[region.kind];
    a->device = region.device;
    a->devicePointer = (void *)p;
    a->hostPointer = region.kind == PINNED ? (void *)p : NULL;
    return cudaSuccess;
}

// returns whether host memory that is not pinned takes part
static int copy(void *to, const void *from, size_t bytes) {
    int there = find_region(to).kind, here = find_region(from).kind;
    counters[COPIES]++;
    if (there == DEVICE && here != DEVICE) counters[COPIES_H2D]++;
    if (here == DEVICE && there != DEVICE) counters[COPIES_D2H]++;
    // device memory stays untouched where nobody will read it
    if (bytes <= (here == DEVICE && there == DEVICE ? SMALL_COPY : LARGE_COPY)) memmove(to, from, bytes);
    // a scalar that the host reads is what no kernel has computed, unless it has come from the other processes
    int sent = last_kernel && (!strcmp(last_kernel->name, "ncclAllGather") || !strcmp(last_kernel->name, "ncclBcast"));
    if (here == DEVICE && there != DEVICE && bytes <= 8 && !sent) memset(to, bytes == 1 && condition_holds(), bytes);
    return there == PAGEABLE || here == PAGEABLE;
}

API cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
    if (recording_here()) return invalidate(cudaErrorStreamCaptureImplicit, "cudaMemcpy");
    counters[SYNCS]++;
    copy(to, from, bytes);
    return cudaSuccess;
}

API cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t s) {
    enqueue(stream_of(s), "cudaMemcpyAsync");
    if (copy(to, from, bytes)) {
        counters[COPIES_PAGEABLE]++;
        if (stream_of(s)->capture) say("%zu bytes of pageable memory are copied in a capture", bytes);
    }
    return cudaSuccess;
}

API cudaError_t cudaMemcpyPeerAsync(void *to, int there, const void *from, int here, size_t bytes, cudaStream_t s) {
    enqueue(stream_of(s), "cudaMemcpyPeerAsync");
    copy(to, from, bytes);
    return cudaSuccess;
}

API cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t s) {
    static struct kernel fill = {"memset"};
    count_kernel(&fill);
    enqueue(stream_of(s), fill.name);
    if (bytes <= SMALL_COPY) memset(p, value, bytes);
    return cudaSuccess;
}

API cudaError_t cudaMemset(void *p, int value, size_t bytes) { return cudaMemsetAsync(p, value, bytes, NULL); }

API cudaError_t cudaGetSymbolAddress(void **p, const void *symbol) {
    // one place for all: nothing reads them
    static void *place;
    if (!place) place = map_memory(SMALL_COPY, DEVICE);
    *p = place;
    return cudaSuccess;
}

// ---- launches -----------------------------------------------------------------------------------------------------

static cudaError_t launch(struct kernel *kernel, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t handle) {
    size_t threads = (size_t)block.x * block.y * block.z;
    int fits = grid.x && grid.y && grid.z && grid.x <= 2147483647u && grid.y <= 65535 && grid.z <= 65535 && threads &&
               threads <= 1024 && block.z <= 64 && shared_bytes <= 232448;
    // registers are given to warps in units of 256
    size_t registers = (threads + 31) / 32 * ((kernel->registers * 32 + 255) / 256 * 256);
    if (!fits || registers > 65536) {
        fprintf(stderr,
                "[null GPU] refused launch of %s: grid %u, %u, %u, block %u, %u, %u, %zu bytes, %zu registers\n",
                kernel->name, grid.x, grid.y, grid.z, block.x, block.y, block.z, shared_bytes, registers);
        return result(fits ? cudaErrorLaunchOutOfResources : cudaErrorInvalidConfiguration);
    }
    count_kernel(kernel);
    enqueue(stream_of(handle), kernel->name);
    return cudaSuccess;
}

// Called by the functions of libraries that build.py writes; which stream they use is not known.
API void null_library_launch(struct kernel *kernel) {
    count_kernel(kernel);
    if (recording_here()) capture.nodes++;
}

// ---- kernels of the runtime: registered by torch's libraries when they are loaded ---------------------------------

struct registered {
    const void *host;
    struct kernel *kernel;
};
static struct registered *registered;
static size_t registered_count, registered_room, registered_sorted;

API void **__cudaRegisterFatBinary(void *binary) {
    static void *handle[4];
    return handle;
}

API void __cudaRegisterFunction(void **handle, const char *host, char *function, const char *name, int threads,
                                void *tid, void *bid, void *block, void *grid, int *warp) {
    pthread_mutex_lock(&lock);
    if (registered_count == registered_room) {
        registered_room = registered_room ? 2 * registered_room : 65536;
        registered = realloc(registered, registered_room * sizeof *registered);
    }
    struct kernel *kernel = calloc(1, sizeof *kernel);
    kernel->name = name;
    registered[registered_count++] = (struct registered){host, kernel};
    pthread_mutex_unlock(&lock);
}

static int by_host(const void *a, const void *b) {
    const void *x = ((struct registered *)a)->host, *y = ((struct registered *)b)->host;
    return x < y ? -1 : x > y;
}

static struct kernel *kernel_of(const void *host) {
    static struct kernel unknown = {"unknown"};
    struct registered wanted = {host};
    pthread_mutex_lock(&lock);
    if (registered_sorted != registered_count) {
        qsort(registered, registered_count, sizeof *registered, by_host);
        registered_sorted = registered_count;
    }
    struct registered *found = bsearch(&wanted, registered, registered_count, sizeof *registered, by_host);
    pthread_mutex_unlock(&lock);
    return found ? found->kernel : &unknown;
}

// `f<<<grid, block>>>()` leaves its configuration here for the function that launches
static __thread struct {
    dim3 grid, block;
    size_t shared_bytes;
    cudaStream_t stream;
} configurations[16];
static __thread int depth;

API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, void *stream) {
    configurations[depth].grid = grid;
    configurations[depth].block = block;
    configurations[depth].shared_bytes = shared_bytes;
    configurations[depth++].stream = stream;
    return 0;
}

API cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared_bytes, void *stream) {
    *grid = configurations[--depth].grid;
    *block = configurations[depth].block;
    *shared_bytes = configurations[depth].shared_bytes;
    *(cudaStream_t *)stream = configurations[depth].stream;
    return cudaSuccess;
}

API cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *host) {
    *kernel = (cudaKernel_t)kernel_of(host);
    return cudaSuccess;
}

API cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared_bytes,
                                   cudaStream_t stream) {
    return launch((struct kernel *)kernel, grid, block, shared_bytes, stream);
}

API cudaError_t cudaLaunchKernel(const void *host, dim3 grid, dim3 block, void **arguments, size_t shared_bytes,
                                 cudaStream_t stream) {
    return launch(kernel_of(host), grid, block, shared_bytes, stream);
}

API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *host, void **arguments) {
    return launch(kernel_of(host), c->gridDim, c->blockDim, c->dynamicSmemBytes, c->stream);
}

API cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *host) {
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024;
    a->binaryVersion = a->ptxVersion = 90;
    a->numRegs = 64;
    return cudaSuccess;
}

API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *count, const void *host, int threads,
                                                                       size_t shared_bytes, unsigned flags) {
    *count = 2;
    return cudaSuccess;
}

static CUresult accept(void) { return CUDA_SUCCESS; }

API cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                                 unsigned long long flags,
                                                 enum cudaDriverEntryPointQueryResult *found) {
    *function = dlsym(RTLD_DEFAULT, name);
    if (!*function) say("%s is not here: it will do nothing", name);
    if (!*function) *function = accept;
    if (found) *found = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

// ---- driver: contexts ---------------------------------------------------------------------------------------------

static CUcontext context_of(int index) { return (CUcontext)(16l + index); }

API CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }

API CUresult cuDriverGetVersion(int *version) { return (CUresult)cudaDriverGetVersion(version); }

API CUresult cuDeviceGet(CUdevice *handle, int index) {
    *handle = index;
    return index < 0 || index >= devices() ? CUDA_ERROR_INVALID_DEVICE : CUDA_SUCCESS;
}

API CUresult cuDeviceGetCount(int *count) {
    *count = devices();
    return CUDA_SUCCESS;
}

API CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute what, CUdevice handle) {
    *value = attribute((int)what);
    return CUDA_SUCCESS;
}

API CUresult cuCtxGetCurrent(CUcontext *context) {
    *context = context_of(device);
    return CUDA_SUCCESS;
}

API CUresult cuCtxSetCurrent(CUcontext context) { return (CUresult)cudaSetDevice((int)((long)context - 16)); }

API CUresult cuCtxGetDevice(CUdevice *handle) {
    *handle = device;
    return CUDA_SUCCESS;
}

API CUresult cuCtxGetLimit(size_t *value, CUlimit limit) {
    *value = 0;
    return CUDA_SUCCESS;
}

API CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }

API CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice handle) {
    *context = context_of(handle);
    return CUDA_SUCCESS;
}

API CUresult cuDevicePrimaryCtxGetState(CUdevice handle, unsigned *flags, int *active) {
    if (flags) *flags = 0;
    *active = 1;
    return CUDA_SUCCESS;
}

API CUresult cuPointerGetAttribute(void *value, CUpointer_attribute what, CUdeviceptr p) {
    if (what != CU_POINTER_ATTRIBUTE_DEVICE_POINTER) return CUDA_SUCCESS;
    // a kernel must not be given a pointer of pageable memory
    if (p && find_region((void *)p).kind == PAGEABLE) return CUDA_ERROR_INVALID_VALUE;
    *(CUdeviceptr *)value = p;
    return CUDA_SUCCESS;
}

// ---- driver: machine code -----------------------------------------------------------------------------------------

// A module is its machine code, an ELF file: Triton's and inductor's compilers made it for sm_90.
struct module {
    char *code;
};

static const Elf64_Shdr *sections(const char *code) {
    return (const Elf64_Shdr *)(code + ((const Elf64_Ehdr *)code)->e_shoff);
}

static const char *section_name(const char *code, const Elf64_Shdr *section) {
    return code + sections(code)[((const Elf64_Ehdr *)code)->e_shstrndx].sh_offset + section->sh_name;
}

static const Elf64_Shdr *find_section(const char *code, const char *prefix, const char *name) {
    size_t length = strlen(prefix);
    for (int i = 0; i < ((const Elf64_Ehdr *)code)->e_shnum; i++) {
        const char *found = section_name(code, sections(code) + i);
        if (!strncmp(found, prefix, length) && !strcmp(found + length, name)) return sections(code) + i;
    }
    return NULL;
}

// What ptxas wrote about a kernel into .nv.info: the registers of a thread, or the bytes of its frame in local memory,
// where spilled registers go. An entry is a byte of format, a byte of kind and two of size, then, where the format says
// so, that many bytes: the number of a symbol and the value.
enum { REGISTERS = 0x2f, FRAME_BYTES = 0x11 };

static int information(const char *code, const char *kernel, int kind) {
    const Elf64_Shdr *info = find_section(code, ".nv.info", ""), *symbols = find_section(code, ".symtab", "");
    if (!info || !symbols) return 0;
    const char *names = code + sections(code)[symbols->sh_link].sh_offset;
    const char *at = code + info->sh_offset, *end = at + info->sh_size;
    while (at + 4 <= end) {
        int has_values = at[0] == 4;
        unsigned short bytes = has_values ? *(const unsigned short *)(at + 2) : 0;
        if (has_values && at[1] == kind && bytes >= 8) {
            const unsigned *values = (const unsigned *)(at + 4);
            const Elf64_Sym *symbol = (const Elf64_Sym *)(code + symbols->sh_offset) + values[0];
            if (!strcmp(names + symbol->st_name, kernel)) return (int)values[1];
        }
        at += 4 + bytes;
    }
    return 0;
}

API CUresult cuModuleLoadData(CUmodule *module, const void *code) {
    const Elf64_Ehdr *head = code;
    if (memcmp(head->e_ident, ELFMAG, SELFMAG)) return CUDA_ERROR_INVALID_IMAGE;
    // the tables of sections and of segments stand at the end, in either order
    size_t a = head->e_shoff + (size_t)head->e_shnum * head->e_shentsize;
    size_t b = head->e_phoff + (size_t)head->e_phnum * head->e_phentsize;
    size_t bytes = a > b ? a : b;
    struct module *made = malloc(sizeof *made);
    made->code = memcpy(malloc(bytes), code, bytes);
    *module = (CUmodule)made;
    return CUDA_SUCCESS;
}

API CUresult cuModuleLoadDataEx(CUmodule *module, const void *code, unsigned count, CUjit_option *options,
                                void **values) {
    return cuModuleLoadData(module, code);
}

API CUresult cuModuleLoad(CUmodule *module, const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file) return CUDA_ERROR_FILE_NOT_FOUND;
    fseek(file, 0, SEEK_END);
    long bytes = ftell(file);
    rewind(file);
    char *code = malloc(bytes > 0 ? bytes : 1);
    size_t got = fread(code, 1, bytes > 0 ? bytes : 0, file);
    fclose(file);
    CUresult error = got >= sizeof(Elf64_Ehdr) ? cuModuleLoadData(module, code) : CUDA_ERROR_INVALID_IMAGE;
    free(code);
    return error;
}

API CUresult cuModuleUnload(CUmodule module) {
    free(((struct module *)module)->code);
    free(module);
    return CUDA_SUCCESS;
}

API CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    const char *code = ((struct module *)module)->code;
    if (!find_section(code, ".text.", name)) return CUDA_ERROR_NOT_FOUND;
    struct kernel *kernel = calloc(1, sizeof *kernel);
    char *text = malloc(strlen(name) + 8);
    sprintf(text, "triton:%s", name);
    kernel->name = text;
    kernel->registers = information(code, name, REGISTERS);
    kernel->local_bytes = information(code, name, FRAME_BYTES);
    *function = (CUfunction)kernel;
    return CUDA_SUCCESS;
}

API CUresult cuFuncGetAttribute(int *value, CUfunction_attribute what, CUfunction function) {
    struct kernel *kernel = (struct kernel *)function;
    *value = what == CU_FUNC_ATTRIBUTE_NUM_REGS                ? kernel->registers
             : what == CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES      ? kernel->local_bytes
             : what == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024
                                                               : 0;
    return CUDA_SUCCESS;
}

API CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute what, int value) {
    int too_much = what == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES && value > 232448;
    return too_much ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

API CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache preference) { return CUDA_SUCCESS; }

API CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *c) {
    *count = 1;
    return CUDA_SUCCESS;
}

API CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *count, CUfunction function, int threads, size_t bytes) {
    *count = 2;
    return CUDA_SUCCESS;
}

API CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                    const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                    const cuuint32_t *steps, CUtensorMapInterleave interleave,
                                    CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                    CUtensorMapFloatOOBfill fill) {
    return CUDA_SUCCESS;
}

API CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction function, void **arguments, void **extra) {
    dim3 grid = {c->gridDimX, c->gridDimY, c->gridDimZ}, block = {c->blockDimX, c->blockDimY, c->blockDimZ};
    return (CUresult)launch((struct kernel *)function, grid, block, c->sharedMemBytes, (cudaStream_t)c->hStream);
}

API CUresult cuLaunchKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                            unsigned bz, unsigned shared_bytes, CUstream stream, void **arguments, void **extra) {
    dim3 grid = {gx, gy, gz}, block = {bx, by, bz};
    return (CUresult)launch((struct kernel *)function, grid, block, shared_bytes, (cudaStream_t)stream);
}

API CUresult cuLaunchCooperativeKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx,
                                       unsigned by, unsigned bz, unsigned bytes, CUstream stream, void **arguments) {
    return cuLaunchKernel(function, gx, gy, gz, bx, by, bz, bytes, stream, arguments, NULL);
}
