// Memory that a thread keeps between calls, one piece per purpose of a family. What is large goes back after the call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace torchlin {

// `Purpose` is an enum of the family whose last name is kCount.
template <class Purpose>
class ScratchOf {
 public:
  template <class C>
  static C* get(Purpose purpose, int64_t count) {
    return static_cast<C*>(pieces()[static_cast<int>(purpose)].get(static_cast<size_t>(count) * sizeof(C)));
  }
  static void trim() {
    for (Piece* p = pieces(); p < pieces() + kPieces; ++p) {
      if (p->size > kKeep) p->release();
    }
  }

 private:
  static constexpr int kPieces = static_cast<int>(Purpose::kCount);
  static constexpr size_t kKeep = size_t{4} << 20;
  struct Piece {
    void* data = nullptr;
    size_t size = 0;
    void* get(size_t bytes) {
      if (bytes > size) {
        release();
        bytes = (bytes + 4095) & ~size_t{4095};
        data = std::aligned_alloc(4096, bytes);
        if (data == nullptr) throw std::bad_alloc();
        size = bytes;
      }
      return data;
    }
    void release() {
      std::free(data);
      data = nullptr;
      size = 0;
    }
    ~Piece() { release(); }
  };
  static Piece* pieces() {
    thread_local Piece list[kPieces];
    return list;
  }
};

}  // namespace torchlin
