#include "activation/table.h"

#include <dlfcn.h>

#include <atomic>
#include <memory>
#include <mutex>

#include "activation/kernels.inc"

namespace torchlin::activation {

#define DECLARE(shard) extern const Table shard;
TORCHLIN_SHARDS(DECLARE)
#undef DECLARE

namespace {

// Open addressing in a table that never changes: one that has more takes its place, and it is never freed, for a call may be
// reading it.
struct Index {
  explicit Index(size_t count) {
    while (mask < 3 * count) mask = 2 * mask + 1;
    slots.resize(mask + 1);
  }
  void add(const Entry& entry) {
    size_t at = static_cast<size_t>(entry.functor.id) & mask;
    while (slots[at] != nullptr && slots[at]->functor.id != entry.functor.id) at = (at + 1) & mask;
    slots[at] = new Entry(entry);
  }
  void add(const Table& table) {
    for (int i = 0; i < table.count; ++i) {
      Entry entry{table.functors[i], {}};
      for (int level = 0; level < kLevels; ++level) {
        if (table.levels[level] != nullptr) entry.levels[level] = table.levels[level] + i;
      }
      add(entry);
    }
  }
  const Entry* find(int64_t id) const {
    for (size_t at = static_cast<size_t>(id) & mask; slots[at] != nullptr; at = (at + 1) & mask) {
      if (slots[at]->functor.id == id) return slots[at];
    }
    return nullptr;
  }

  size_t mask = 1;
  std::vector<const Entry*> slots;
};

std::vector<const Table*>& tables() {
#define POINTER(shard) &shard,
  static std::vector<const Table*> all{TORCHLIN_SHARDS(POINTER)};
#undef POINTER
  return all;
}

const Index* make_index() {
  size_t count = 0;
  for (const Table* table : tables()) count += static_cast<size_t>(table->count);
  auto* const index = new Index(count);
  for (const Table* table : tables()) index->add(*table);
  return index;
}

std::atomic<const Index*>& current() {
  static std::atomic<const Index*> index{make_index()};
  return index;
}

}  // namespace

const Entry* find(int64_t id) { return current().load(std::memory_order_acquire)->find(id); }

std::vector<int64_t> load(const std::string& path, std::string& problem) {
  void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    problem = dlerror();
    return {};
  }
  const auto* const table = static_cast<const Table*>(dlsym(library, kLibrarySymbol));
  if (table == nullptr) {
    problem = path + " has no " + kLibrarySymbol;
  } else if (table->abi != kAbi || table->args_size != static_cast<int32_t>(sizeof(Args))) {
    problem = path + " was made for another version of the kernels: " + std::to_string(table->abi) + " with " +
              std::to_string(table->args_size) + " bytes of arguments, this one is " + std::to_string(kAbi) + " with " +
              std::to_string(sizeof(Args));
  }
  if (!problem.empty()) {
    dlclose(library);
    return {};
  }
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  current();
  tables().push_back(table);
  current().store(make_index(), std::memory_order_release);
  std::vector<int64_t> ids;
  for (int i = 0; i < table->count; ++i) ids.push_back(table->functors[i].id);
  return ids;
}

}  // namespace torchlin::activation
