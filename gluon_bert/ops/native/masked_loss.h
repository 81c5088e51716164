// The masked-language-model head with its loss: gather, dense layer, LayerNorm, decoder, cross-entropy.
//
// The scores of all words are never in memory at once. The threads divide the vocabulary. For a slice of masked
// positions at a time they compute their scores, reduce the softmax's sums, and turn the scores into gradients.
// So the gradients are ready with the loss. A tile has a row for each word and a column for each position, so the
// decoder's weights are a left side and stay as they are. A tile of scores becomes powers of e while it is in the
// cache, relative to the highest score of its column in the tile. Later each column needs only one more factor.
#pragma once

#include <omp.h>

#include <cmath>
#include <vector>

#include "buffer_pool.h"
#include "elementwise.h"
#include "encoder_layer.h"
#include "gemm.h"

namespace gluon_bert {

struct Head {
  int units, words;  // C, V
  Activation activation;
  float epsilon;
  Dense transform;
  Norm norm;
  Dense decoder;
};

struct MaskedTokens {
  const float *encoded, *positions, *ids;  // (B, T, C), (2, M) rows above columns, (M,)
  int rows, columns, count;                // B, T, M
};

// Where the gradients go. `add`: the parameters' are added to what the arrays hold. That of encoded never is.
struct HeadGradients {
  bool add;
  float *encoded, *transform, *transform_bias, *gamma, *beta, *decoder, *decoder_bias;
};

// T: what products are made of, float or Bf16x2 (gemm.h).
template <class T>
class MaskedLoss {
 public:
  // keep: for a backward pass.
  MaskedLoss(const Head& head, const MaskedTokens& positions, bool keep) : h_(head), p_(positions), keep_(keep) {
    ld_ = stride(h_.units);
    threads_ = std::max(1, std::min(omp_get_max_threads(), panels(h_.words)));
  }

  // Sets the parameters and inputs of this call. Those of the forward pass may have moved since.
  void rebind(const Head& head, const MaskedTokens& positions) { h_ = head, p_ = positions; }

  // The sum of the losses in nats, and how many masked words have the highest score.
  void forward(float* loss, float* num_correct) {
    const size_t rows = (size_t)p_.count * ld_;
    for (PooledBuffer* one : {&gathered_, &before_, &after_, &ready_}) *one = PooledBuffer(rows);
    statistics_.resize(p_.count);
    transform();
    if (keep_) {
      d_decoder_ = PooledBuffer((size_t)h_.words * h_.units), d_bias_ = PooledBuffer(h_.words);
      d_ready_ = PooledBuffer(rows * threads_);
    }
    decode(loss, num_correct);
    if (keep_) transform_backward();
  }

  // `scale`: the gradient of the loss.
  void backward(float scale, const HeadGradients& out) const {
    const long c = h_.units, size = (long)p_.rows * p_.columns * c;
    scale_into(d_decoder_, (long)h_.words * c, scale, out.add, out.decoder);
    scale_into(d_bias_, h_.words, scale, out.add, out.decoder_bias);
    scale_into(d_transform_, c * c, scale, out.add, out.transform);
    scale_into(d_transform_ + c * c, c, scale, out.add, out.transform_bias);
    scale_into(d_transform_ + c * c + c, c, scale, out.add, out.gamma);
    scale_into(d_transform_ + c * c + 2 * c, c, scale, out.add, out.beta);
#pragma omp parallel for num_threads(threads_) schedule(static)
    for (long i = 0; i < size; i += c) std::fill_n(out.encoded + i, c, 0.f);
    for (int m = 0; m < p_.count; ++m)
      for (int j = 0; j < c; ++j) out.encoded[token_of(m) * c + j] += scale * gathered_[m * ld_ + j];
  }

 private:
  // The most masked positions of a slice, and the words of a tile of scores: both fill whole tiles and panels of
  // products. The slice's vectors, a tile of scores and the tile's rows of the decoder fit a second cache.
  static constexpr int kSlice = 320, kTile = 240;
  static constexpr long kTileStride = stride(kSlice), kTileSize = kTile * kTileStride;

  // A softmax's sum over one thread's words: the highest score, and the sum of e^(score - highest).
  struct PartialSoftmax {
    float most[kSlice], sum[kSlice];
  };
  // A thread's working memory: its scores for a slice, tile after tile, as powers and then as gradients; the
  // highest score of each tile's columns; a tile of the decoder and the slice's vectors, packed; and the scores of
  // the masked words that are among its words.
  struct ThreadBuffers {
    PooledBuffer tiles, highest, packed, vectors;
    float target_score[kSlice];
  };

  long token_of(int m) const {
    const long row = std::min(std::max(p_.positions[m], 0.f), (float)(p_.rows - 1));
    const long column = std::min(std::max(p_.positions[p_.count + m], 0.f), (float)(p_.columns - 1));
    return row * p_.columns + column;
  }
  int target(int m) const { return (int)std::min(std::max(p_.ids[m], 0.f), (float)(h_.words - 1)); }

  // The first of `count` items that a thread gets.
  static int first_of(long count, int thread, int threads) { return (int)(count * thread / threads); }

  void transform() {
    const int c = h_.units;
    PooledBuffer weight(packed_size<T>(c, c));
    const Right<T> packed = pack_transposed(h_.transform.weight, c, c, c, weight.as<T>());
#pragma omp parallel num_threads(threads_)
    {
      const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
      const int first = first_of(p_.count, thread, threads), some = first_of(p_.count, thread + 1, threads) - first;
      for (int m = first; m < first + some; ++m)
        std::copy_n(p_.encoded + token_of(m) * c, c, gathered_ + m * ld_);
      multiply(some, c, c, {gathered_ + first * ld_, ld_, 1}, packed, with_bias(h_.transform.bias),
               before_ + first * ld_, ld_);
      for (int m = first; m < first + some; ++m) {
        activate(h_.activation, before_ + m * ld_, c, after_ + m * ld_);
        statistics_[m] = statistics(after_ + m * ld_, c, h_.epsilon);
        normalize(after_ + m * ld_, c, statistics_[m], h_.norm, ready_ + m * ld_);
      }
    }
  }

  void decode(float* loss, float* num_correct) {
    // The slices are even. A short one would take the decoder's weights through the processor for little.
    const int slice = kCols * even_part(panels(p_.count), kSlice / kCols);
    // Of this slice and the one before, which other threads may still read.
    std::vector<PartialSoftmax> partial_sums(2 * threads_);
    std::vector<double> losses(threads_ * 16), right(threads_ * 16);
    tiles_ = h_.words / threads_ / kTile + 1;
    std::vector<ThreadBuffers> rooms(threads_);
    for (ThreadBuffers& room : rooms) {
      room.tiles = PooledBuffer(tiles_ * kTileSize);
      room.highest = PooledBuffer(tiles_ * kSlice);
      room.packed = PooledBuffer(packed_size<T>(h_.units, kTile));
      room.vectors = PooledBuffer(std::max(packed_size<T>(kSlice, h_.units), room_size<T>(h_.units, kSlice)));
    }
#pragma omp parallel num_threads(threads_)
    {
      const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
      const Words words{first_of(h_.words, thread, threads), first_of(h_.words, thread + 1, threads)};
      ThreadBuffers& own = rooms[thread];
      float log_sums[kSlice];
      int number = 0;
      for (int first = 0; first < p_.count; first += slice, ++number) {
        const int some = std::min(slice, p_.count - first);
        PartialSoftmax* all = partial_sums.data() + number % 2 * threads;
        compute_scores(first, some, words, own, all[thread]);
#pragma omp barrier
        for (int i = 0; i < some; ++i) {
          float most = all[0].most[i], sum = 0;
          for (int t = 1; t < threads; ++t) most = std::max(most, all[t].most[i]);
          for (int t = 0; t < threads; ++t) sum += all[t].sum[i] * exponential(all[t].most[i] - most);
          log_sums[i] = most + std::log(sum);
          const int word = target(first + i);
          if (word < words.first || word >= words.last) continue;
          losses[thread * 16] += log_sums[i] - own.target_score[i];
          right[thread * 16] += own.target_score[i] >= most;
        }
        if (keep_) decoder_backward(first, some, words, own, log_sums);
      }
    }
    double total = 0, found = 0;
    for (int t = 0; t < threads_; ++t) total += losses[t * 16], found += right[t * 16];
    *loss = (float)total, *num_correct = (float)found;
  }

  struct Words {
    int first, last;
  };

  // A thread's scores of some masked positions, as powers.
  void compute_scores(int first, int some, Words words, ThreadBuffers& room, PartialSoftmax& found) const {
    const int c = h_.units;
    const Right<T> vectors = pack_transposed(ready_ + first * ld_, ld_, c, some, room.vectors.template as<T>());
    std::fill_n(found.most, some, -INFINITY);
    std::fill_n(found.sum, some, 0.f);
    for (int begin = words.first, number = 0; begin < words.last; begin += kTile, ++number) {
      const int width = std::min(kTile, words.last - begin);
      float* tile = room.tiles + number * kTileSize;
      multiply(width, some, c, {h_.decoder.weight + (long)begin * c, c, 1}, vectors, kZero, tile, kTileStride);
      for (int i = 0; i < some; ++i) {
        const int at = target(first + i) - begin;
        if (at >= 0 && at < width) room.target_score[i] = tile[at * kTileStride + i] + h_.decoder.bias[begin + at];
      }
      to_powers(tile, width, some, h_.decoder.bias + begin, room.highest + number * kSlice, found);
    }
  }

  // A tile of scores without their bias becomes powers of e, relative to the highest score of each column. They are
  // added to the sums in `found`.
  static void to_powers(float* tile, int width, int some, const float* bias, float* highest, PartialSoftmax& found) {
    float sum[kSlice] = {};
    std::fill_n(highest, some, -INFINITY);
    for (int w = 0; w < width; ++w) {
      float* row = tile + w * kTileStride;
#pragma omp simd
      for (int i = 0; i < some; ++i) {
        row[i] += bias[w];
        highest[i] = row[i] > highest[i] ? row[i] : highest[i];
      }
    }
    for (int w = 0; w < width; ++w) {
      float* row = tile + w * kTileStride;
#pragma omp simd
      for (int i = 0; i < some; ++i) {
        row[i] = exponential(row[i] - highest[i]);
        sum[i] += row[i];
      }
    }
#pragma omp simd
    for (int i = 0; i < some; ++i) {
      const float most = highest[i] > found.most[i] ? highest[i] : found.most[i];
      found.sum[i] = found.sum[i] * exponential(found.most[i] - most) + sum[i] * exponential(highest[i] - most);
      found.most[i] = most;
    }
  }

  // The gradients of the decoder and of its input, from a thread's scores.
  void decoder_backward(int first, int some, Words words, ThreadBuffers& room, const float* log_sums) {
    const int c = h_.units;
    float* d_ready = d_ready_ + (omp_get_thread_num() * (long)p_.count + first) * ld_;
    const Right<T> vectors = right_side(ready_ + first * ld_, ld_, some, c, room.vectors.template as<T>());
    for (int begin = words.first, number = 0; begin < words.last; begin += kTile, ++number) {
      const int width = std::min(kTile, words.last - begin);
      float* tile = room.tiles + number * kTileSize;
      to_gradients(first, some, begin, width, room.highest + number * kSlice, log_sums, tile);
      const Right<T> weight = pack(h_.decoder.weight + (long)begin * c, c, width, c, room.packed.template as<T>());
      const Left<float> by_word{tile, kTileStride, 1}, by_position{tile, 1, kTileStride};
      if (begin == words.first)
        multiply(some, c, width, by_position, weight, kZero, d_ready, ld_);
      else
        multiply(some, c, width, by_position, weight, kAdd, d_ready, ld_);
      float* d_weight = d_decoder_ + (long)begin * c;
      if (first == 0)
        multiply(width, c, some, by_word, vectors, kZero, d_weight, c);
      else
        multiply(width, c, some, by_word, vectors, kAdd, d_weight, c);
    }
  }

  // A tile of powers becomes the gradients of its scores. Their sums are the gradients of the biases.
  void to_gradients(int first, int some, int begin, int width, const float* highest, const float* log_sums,
                    float* tile) {
    float factor[kSlice];
#pragma omp simd
    for (int i = 0; i < some; ++i) factor[i] = exponential(highest[i] - log_sums[i]);
    for (int w = 0; w < width; ++w) {
      float* row = tile + w * kTileStride;
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int i = 0; i < some; ++i) {
        row[i] *= factor[i];
        sum += row[i];
      }
      d_bias_[begin + w] = (first ? d_bias_[begin + w] : 0.f) + sum;
    }
    for (int i = 0; i < some; ++i) {
      const int at = target(first + i) - begin;
      if (at < 0 || at >= width) continue;
      tile[at * kTileStride + i] -= 1;
      d_bias_[begin + at] -= 1;
    }
  }

  // From the gradients of the decoder's input to those of the transform and of its input, into gathered_.
  void transform_backward() {
    const int c = h_.units, count = p_.count;
    const size_t size = (size_t)c * c + 3 * c;
    PooledBuffer weight(packed_size<T>(c, c)), sums(size * threads_);
    const Right<T> packed = pack(h_.transform.weight, c, c, c, weight.as<T>());
    d_transform_ = PooledBuffer(size);
#pragma omp parallel num_threads(threads_)
    {
      const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
      const int first = first_of(count, thread, threads), some = first_of(count, thread + 1, threads) - first;
      float* own = sums + thread * size;
      std::fill_n(own, size, 0.f);
      float* d = d_ready_ + first * ld_;
      for (int m = first; m < first + some; ++m) {
        float* row = d_ready_ + m * ld_;
        for (int t = 1; t < threads; ++t) add(d_ready_ + (t * (long)count + m) * ld_, c, row);
        normalize_backward(after_ + m * ld_, row, c, statistics_[m], h_.norm, row, own + (long)c * c + c,
                           own + (long)c * c + 2 * c);
        activate_backward(h_.activation, before_ + m * ld_, c, row);
        add(row, c, own + (long)c * c);
      }
      PooledBuffer room(room_size<T>(c, some));
      const Right<T> vectors = right_side(gathered_ + first * ld_, ld_, some, c, room.as<T>());
      multiply(c, c, some, {d, 1, ld_}, vectors, kAdd, own, c);
      multiply(some, c, c, {d, ld_, 1}, packed, kZero, gathered_ + first * ld_, ld_);
#pragma omp barrier
#pragma omp for schedule(static)
      for (long i = 0; i < (long)size; ++i) {
        d_transform_[i] = sums[i];
        for (int t = 1; t < threads; ++t) d_transform_[i] += sums[t * size + i];
      }
    }
  }

  // out = scale * x, or out += scale * x.
  void scale_into(const float* x, long count, float scale, bool add, float* out) const {
#pragma omp parallel for num_threads(threads_) schedule(static) if (count > 1 << 14)
    for (long i = 0; i < count; ++i) out[i] = (add ? out[i] : 0.f) + scale * x[i];
  }

  Head h_;
  MaskedTokens p_;
  bool keep_;
  int threads_;
  long ld_, tiles_ = 0;
  // (M, C) each: the encoded vectors, later their gradients; the transform before and after its activation; the
  // decoder's input.
  PooledBuffer gathered_, before_, after_, ready_;
  std::vector<Statistics> statistics_;
  PooledBuffer d_decoder_, d_bias_, d_ready_, d_transform_;
};

}  // namespace gluon_bert
