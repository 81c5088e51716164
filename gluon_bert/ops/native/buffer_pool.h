// Keeps memory from step to step. New memory from the system costs a page fault every 4 KiB.
#pragma once

#include <cstdlib>
#include <iterator>
#include <map>
#include <mutex>
#include <new>
#include <utility>

namespace gluon_bert {

// Blocks of floats that callers acquire and release. Threads may share it.
class BufferPool {
 public:
  static BufferPool& instance() {
    static BufferPool* pool = new BufferPool;  // never destroyed: blocks may be released while the process ends
    return *pool;
  }

  // Returns a block of at least `count` floats, on a cache line of its own. Sets `size` to its size.
  float* acquire(size_t count, size_t* size) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = free_.lower_bound(count);
    if (found != free_.end() && found->first <= kWaste * count + kSmall) return take(found, size);
    // A new block replaces the largest free one that is too small. So blocks grow until they serve the longest
    // batches, and then no more are made.
    size_t ignored;
    if (found != free_.begin()) std::free(take(std::prev(found), &ignored));
    *size = count + count / 8 + 64;
    *size = (*size + 15) / 16 * 16;
    void* block = std::aligned_alloc(64, *size * sizeof(float));
    if (!block) throw std::bad_alloc();
    return static_cast<float*>(block);
  }

  void release(float* block, size_t size) {
    std::lock_guard<std::mutex> lock(mutex_);
    free_.emplace(size, block);
  }

 private:
  // A block may be this many times as large as asked, and larger by so many floats.
  static constexpr size_t kWaste = 8, kSmall = 1 << 16;

  float* take(std::multimap<size_t, float*>::iterator entry, size_t* size) {
    float* block = entry->second;
    *size = entry->first;
    free_.erase(entry);
    return block;
  }

  std::mutex mutex_;
  std::multimap<size_t, float*> free_;
};

// A block of the pool for as long as this object lives. Products may read a few floats past `count`.
class PooledBuffer {
 public:
  PooledBuffer() = default;
  explicit PooledBuffer(size_t count) { data_ = BufferPool::instance().acquire(count + 64, &size_); }
  PooledBuffer(PooledBuffer&& other) noexcept { swap(other); }
  PooledBuffer& operator=(PooledBuffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~PooledBuffer() {
    if (data_) BufferPool::instance().release(data_, size_);
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
  void swap(PooledBuffer& other) {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }

  float* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace gluon_bert
