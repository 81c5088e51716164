// Memory that stays from step to step: what the system gives anew costs a page fault every 4 KiB.
#pragma once

#include <cstdlib>
#include <map>
#include <mutex>
#include <new>
#include <utility>

namespace gluon_bert {

// Blocks of floats that are lent and come back. Safe from several threads.
class Pool {
 public:
  static Pool& instance() {
    static Pool* pool = new Pool;  // never destroyed: blocks may come back while the process ends
    return *pool;
  }

  // A block of at least `count` floats, on a cache line of its own; its size is set to what it holds.
  float* lend(size_t count, size_t* size) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = free_.lower_bound(count);
    if (found != free_.end() && found->first <= 2 * count + kSmall) return take(found, size);
    // What is too small would be kept for nothing: lengths differ, and the longest is soon met.
    while (!free_.empty() && free_.begin()->first < count) std::free(take(free_.begin(), size));
    *size = count + count / 8 + 64;
    *size = (*size + 15) / 16 * 16;
    void* block = std::aligned_alloc(64, *size * sizeof(float));
    if (!block) throw std::bad_alloc();
    return static_cast<float*>(block);
  }

  void give_back(float* block, size_t size) {
    std::lock_guard<std::mutex> lock(mutex_);
    free_.emplace(size, block);
    while (free_.size() > kMost) {
      size_t ignored;
      std::free(take(free_.begin(), &ignored));
    }
  }

 private:
  static constexpr size_t kSmall = 1 << 16, kMost = 16;

  float* take(std::multimap<size_t, float*>::iterator entry, size_t* size) {
    float* block = entry->second;
    *size = entry->first;
    free_.erase(entry);
    return block;
  }

  std::mutex mutex_;
  std::multimap<size_t, float*> free_;
};

// Floats of the pool for as long as this lives. A few more than asked for may be read, as products do.
class Floats {
 public:
  Floats() = default;
  explicit Floats(size_t count) : data_(Pool::instance().lend(count + 64, &size_)) {}
  Floats(Floats&& other) noexcept { swap(other); }
  Floats& operator=(Floats&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Floats() {
    if (data_) Pool::instance().give_back(data_, size_);
  }
  float* get() const { return data_; }
  // The same memory, for other elements of this size.
  template <class T>
  T* as() const {
    static_assert(sizeof(T) == sizeof(float), "as large as a float");
    return reinterpret_cast<T*>(data_);
  }
  operator float*() const { return data_; }

 private:
  void swap(Floats& other) {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }

  float* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace gluon_bert
