// Large fresh outputs in huge pages. Touching new memory in pages of 4 KiB costs several times what the kernel that writes it
// does: relu of 64 MiB took 4.8 ns an element, 2.5 with huge pages, 1.3 into memory that was there. The tensor is as always;
// only how the system backs it differs.
#pragma once

#include <atomic>
#include <cstdint>

namespace torchlin {

// Allocations of as many bytes and more; negative: none. TORCHLIN_HUGE_PAGES sets it, 0 for none.
std::atomic<int64_t>& huge_page_threshold();

// Asks for huge pages in what was just allocated. Advice: where the system has none, nothing happens.
void advise_huge_pages(void* data, int64_t bytes);

}  // namespace torchlin
