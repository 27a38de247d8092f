// Large fresh outputs in huge pages: the first touch of 4 KiB pages costs several times what the kernel that writes them does
// (512 page faults for 2 MiB, where one does). The memory is the caller's tensor as always; only how the system backs it differs.
#pragma once

#include <atomic>
#include <cstdint>

namespace torchlin {

// Allocations of as many bytes and more; negative: none. TORCHLIN_HUGE_PAGES sets it, 0 for none.
std::atomic<int64_t>& huge_page_threshold();

// Asks for huge pages in what was just allocated. Advice: where the system has none, nothing happens.
void advise_huge_pages(void* data, int64_t bytes);

}  // namespace torchlin
