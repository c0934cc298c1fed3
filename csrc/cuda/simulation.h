// Runs a CUDA kernel on the CPU: the threads of a block are fibres that run one after the other between barriers, in
// forward, reverse or shuffled order, so that a missing barrier changes a result. A barrier that not all threads reach
// ends the program with a message. Blocks run one after the other; shared memory is full of NaN when a block begins.
#pragma once

#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define DSFT_SHARED(type, name, count)                                          \
  static const char name##_place = 0; /* its address is a key, one an instance */ \
  type* const name = static_cast<type*>(dsft::simulation::shared_memory(&name##_place, sizeof(type) * (count)))
#define DSFT_LAUNCH(kernel, blocks, threads, stream, ...) \
  ((void)(stream), dsft::simulation::launch((blocks), (threads), [&] { kernel(__VA_ARGS__); }))

struct DsftIndex {
  unsigned x;
};
inline DsftIndex threadIdx, blockIdx, blockDim, gridDim;

namespace dsft {

inline int32_t launch_error() { return 0; }

namespace simulation {

enum class Order { kForward, kReverse, kShuffled };
enum class State { kReady, kAtWarpBarrier, kAtBlockBarrier, kDone };

constexpr size_t kStackBytes = 64 << 10, kExchangeBytes = 16, kWarpThreads = 32;

struct Fibre {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStackBytes);
  State state = State::kReady;
  void* sanitizer = nullptr;
};

inline Order order = Order::kForward;
inline ucontext_t scheduler;
inline void* scheduler_sanitizer = nullptr;
inline const void* scheduler_stack = nullptr;
inline size_t scheduler_stack_bytes = 0;
inline std::vector<Fibre> fibres;
inline std::vector<char> exchange;  // one slot a thread, for shuffles
inline std::map<const void*, std::vector<char>> shared;
inline const std::function<void()>* body = nullptr;

inline void start_switch(void** from, const void* stack, size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(from, stack, bytes);
#else
  (void)from, (void)stack, (void)bytes;
#endif
}

inline void finish_switch(void* to, const void** stack, size_t* bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(to, stack, bytes);
#else
  (void)to, (void)stack, (void)bytes;
#endif
}

inline void* shared_memory(const void* key, size_t bytes) {
  std::vector<char>& memory = shared[key];
  if (memory.empty()) memory.assign(bytes, '\xff');
  return memory.data();
}

// From a fibre to the scheduler, until the scheduler finds it ready again.
inline void wait(State state) {
  Fibre& fibre = fibres[threadIdx.x];
  fibre.state = state;
  start_switch(state == State::kDone ? nullptr : &fibre.sanitizer, scheduler_stack, scheduler_stack_bytes);
  swapcontext(&fibre.context, &scheduler);
  finish_switch(fibre.sanitizer, nullptr, nullptr);
}

inline void fibre_main() {
  finish_switch(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  (*body)();
  wait(State::kDone);
}

inline void resume(unsigned thread) {
  threadIdx.x = thread;
  Fibre& fibre = fibres[thread];
  start_switch(&scheduler_sanitizer, fibre.stack.data(), fibre.stack.size());
  swapcontext(&scheduler, &fibre.context);
  finish_switch(scheduler_sanitizer, nullptr, nullptr);
}

inline unsigned place(unsigned i, unsigned count, unsigned round) {
  if (order == Order::kForward) return i;
  if (order == Order::kReverse) return count - 1 - i;
  return (i * 7919u + round * 104729u) % count;  // a permutation: no block has a multiple of 7919 threads
}

// Whether some threads may go on: those of warps, or of the block, that have all reached a barrier.
inline bool release() {
  bool released = false;
  for (size_t first = 0; first < fibres.size(); first += kWarpThreads) {
    const size_t last = first + kWarpThreads < fibres.size() ? first + kWarpThreads : fibres.size();
    bool all = true;
    for (size_t i = first; i < last; ++i) all = all && fibres[i].state == State::kAtWarpBarrier;
    for (size_t i = first; all && i < last; ++i) fibres[i].state = State::kReady;
    released = released || all;
  }
  if (released) return true;
  for (const Fibre& fibre : fibres)
    if (fibre.state != State::kAtBlockBarrier) return false;
  for (Fibre& fibre : fibres) fibre.state = State::kReady;
  return true;
}

inline void run_block() {
  shared.clear();
  for (Fibre& fibre : fibres) {
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack.data();
    fibre.context.uc_stack.ss_size = fibre.stack.size();
    fibre.context.uc_link = nullptr;
    fibre.state = State::kReady;
    makecontext(&fibre.context, fibre_main, 0);
  }
  const unsigned count = static_cast<unsigned>(fibres.size());
  for (unsigned round = 0;; ++round) {
    for (unsigned i = 0; i < count; ++i) {
      const unsigned thread = place(i, count, round);
      if (fibres[thread].state == State::kReady) resume(thread);
    }
    bool done = true;
    for (const Fibre& fibre : fibres) done = done && fibre.state == State::kDone;
    if (done) return;
    if (!release()) {
      fprintf(stderr, "simulated kernel: a barrier that not all threads reach\n");
      abort();
    }
  }
}

inline void launch(int64_t blocks, int threads, const std::function<void()>& kernel) {
  body = &kernel;
  fibres = std::vector<Fibre>(static_cast<size_t>(threads));
  exchange.assign(static_cast<size_t>(threads) * kExchangeBytes, 0);
  blockDim.x = static_cast<unsigned>(threads);
  gridDim.x = static_cast<unsigned>(blocks);
  for (int64_t block = 0; block < blocks; ++block) {
    blockIdx.x = static_cast<unsigned>(block);
    run_block();
  }
}

}  // namespace simulation
}  // namespace dsft

inline void __syncthreads() { dsft::simulation::wait(dsft::simulation::State::kAtBlockBarrier); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int lanes) {
  using namespace dsft::simulation;
  static_assert(sizeof(T) <= kExchangeBytes, "fits into a slot");
  const unsigned self = threadIdx.x;
  memcpy(&exchange[self * kExchangeBytes], &value, sizeof(T));
  wait(State::kAtWarpBarrier);
  memcpy(&value, &exchange[(self ^ static_cast<unsigned>(lanes)) * kExchangeBytes], sizeof(T));
  wait(State::kAtWarpBarrier);
  return value;
}
