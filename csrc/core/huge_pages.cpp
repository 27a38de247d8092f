#include "core/huge_pages.h"

#include <cstdio>
#include <cstdlib>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "core/op.h"

namespace torchlin {
namespace {

constexpr int64_t kDefaultThreshold = int64_t{4} << 20;
constexpr uintptr_t kHugePage = uintptr_t{2} << 20;

int64_t initial_threshold() {
  const char* wanted = std::getenv("TORCHLIN_HUGE_PAGES");
  if (wanted == nullptr || *wanted == '\0') return kDefaultThreshold;
  char* end = nullptr;
  const long long bytes = std::strtoll(wanted, &end, 10);
  if (*end == '\0') return bytes > 0 ? bytes : -1;
  std::fprintf(stderr, "torchlin: TORCHLIN_HUGE_PAGES: '%s' is no number of bytes. Using %lld.\n", wanted,
               static_cast<long long>(kDefaultThreshold));
  return kDefaultThreshold;
}

void op_set_huge_pages(int64_t threshold_bytes) { huge_page_threshold().store(threshold_bytes < 0 ? -1 : threshold_bytes); }
int64_t op_huge_pages() { return huge_page_threshold().load(); }

}  // namespace

std::atomic<int64_t>& huge_page_threshold() {
  static std::atomic<int64_t> threshold{initial_threshold()};
  return threshold;
}

void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // Whole huge pages inside of the allocation only: its ends share pages with other memory.
  const uintptr_t first = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (first + kHugePage - 1) & -kHugePage, end = (first + static_cast<uintptr_t>(bytes)) & -kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace torchlin

STABLE_TORCH_LIBRARY_FRAGMENT(torchlin, m) {
  m.def("_huge_pages() -> int");
  m.def("_set_huge_pages(int threshold_bytes) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(torchlin, CompositeExplicitAutograd, m) {
  TORCHLIN_IMPL(m, "_huge_pages", torchlin::op_huge_pages);
  TORCHLIN_IMPL(m, "_set_huge_pages", torchlin::op_set_huge_pages);
}
