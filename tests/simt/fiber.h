// Fibers for the emulator: one stack a CUDA thread, switched by hand. swapcontext makes a system call per
// switch, which is ten times dearer; it stays as the fallback for other processors.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__) || defined(__aarch64__)
#define SIMT_ASM_SWITCH 1
extern "C" void simt_switch(void** save, void* resume);
#else
#include <ucontext.h>
#endif

#if defined(__x86_64__)
asm(R"(
  .text
  .weak simt_switch
  .hidden simt_switch
  .type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size simt_switch, .-simt_switch
)");
#elif defined(__aarch64__)
asm(R"(
  .text
  .weak simt_switch
  .hidden simt_switch
  .type simt_switch, %function
simt_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
  .size simt_switch, .-simt_switch
)");
#endif

namespace simt {

class Fiber {
 public:
  static constexpr size_t kStackBytes = size_t{256} << 10;

  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber() {
    if (stack_) munmap(stack_, kGuardBytes + kStackBytes);
  }

  // Prepares the fiber to run entry(), which must never return: it switches back to the scheduler for good.
  void start(void (*entry)()) {
    if (!stack_) allocate();
    char* top = stack_ + kGuardBytes + kStackBytes;
#if defined(__x86_64__)
    void** sp = reinterpret_cast<void**>(top) - 1;  // leaves rsp % 16 == 8 at entry, as after a call
    *--sp = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--sp = nullptr;
    context_ = sp;
#elif defined(__aarch64__)
    uint64_t* sp = reinterpret_cast<uint64_t*>(top) - 20;
    for (int i = 0; i < 20; ++i) sp[i] = 0;
    sp[11] = reinterpret_cast<uint64_t>(entry);  // x30
    context_ = sp;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_ + kGuardBytes;
    context_.uc_stack.ss_size = kStackBytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
    (void)top;
#endif
  }

  void resume() {
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, stack_ + kGuardBytes, kStackBytes);
#endif
#if defined(SIMT_ASM_SWITCH)
    simt_switch(&scheduler_, context_);
#else
    swapcontext(&scheduler_, &context_);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  }

  // Called on the fiber: back to whoever resumed it. `last` says that it will not run again.
  void suspend([[maybe_unused]] bool last) {
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(last ? nullptr : &fake, main_bottom_, main_size_);
#endif
#if defined(SIMT_ASM_SWITCH)
    simt_switch(&context_, scheduler_);
#else
    swapcontext(&context_, &scheduler_);
#endif
    entered();
  }

  // First thing to do on the fiber after each switch to it.
  static void entered() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &main_bottom_, &main_size_);
#endif
  }

 private:
  static constexpr size_t kGuardBytes = size_t{16} << 10;

  void allocate() {
    void* p = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::runtime_error("simt: no memory for a fiber's stack");
    mprotect(p, kGuardBytes, PROT_NONE);
    stack_ = static_cast<char*>(p);
  }

  char* stack_ = nullptr;
#if defined(SIMT_ASM_SWITCH)
  void* context_ = nullptr;
  inline static void* scheduler_ = nullptr;
#else
  ucontext_t context_{};
  inline static ucontext_t scheduler_{};
#endif
#if defined(__SANITIZE_ADDRESS__)
  inline static const void* main_bottom_ = nullptr;
  inline static size_t main_size_ = 0;
#endif
};

}  // namespace simt
