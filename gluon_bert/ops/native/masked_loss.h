// The masked-language-model head with its loss: gather, dense layer, LayerNorm, decoder, cross-entropy.
//
// The scores of all words are never there at once. The threads divide the vocabulary; for kSlice predictions
// at a time they make their scores, agree on the softmax's sums, and use the scores up for the gradients: when
// the loss is known its gradients are, too. A tile of scores becomes powers of e while it is in the cache, each
// against the highest of its row in the tile; what is left for later is a factor a row and tile.
#pragma once

#include <omp.h>

#include <cmath>
#include <vector>

#include "encoder.h"
#include "gemm.h"
#include "buffer_pool.h"
#include "elementwise.h"

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
  const float *encoded, *masked_positions, *masked_ids;  // (B, T, C), (2, M), (M,)
  int rows, columns, count;                // B, T, M
};

// Where the gradients go. The parameters' are added to what is there, or fill it; that of encoded is filled.
struct HeadGradients {
  bool add;
  float *encoded, *transform, *transform_bias, *gamma, *beta, *decoder, *decoder_bias;
};

// T: what products are made of, float or Pair (gemm.h).
template <class T>
class MaskedLoss {
 public:
  // keep: for a backward pass.
  MaskedLoss(const Head& head, const MaskedTokens& masked, bool keep) : h_(head), p_(masked), keep_(keep) {
    ld_ = stride(h_.units);
    threads_ = std::max(1, std::min(omp_get_max_threads(), panels(h_.words)));
  }

  // The sum of the losses in nats, and the number of labels with the highest score.
  void forward(float* loss, float* hits) {
    const size_t rows = (size_t)p_.count * ld_;
    gathered_ = Floats(rows), before_ = Floats(rows), after_ = Floats(rows), ready_ = Floats(rows);
    statistics_.resize(p_.count);
    transform();
    if (keep_) {
      d_decoder_ = Floats((size_t)h_.words * h_.units), d_bias_ = Floats(h_.words);
      d_ready_ = Floats(rows * threads_);
    }
    decode(loss, hits);
    if (keep_) transform_backward();
  }

  // `scale`: the gradient of the loss.
  void backward(float scale, const HeadGradients& out) const {
    const long c = h_.units, size = (long)p_.rows * p_.columns * c;
    hand_out(d_decoder_, (long)h_.words * c, scale, out.add, out.decoder);
    hand_out(d_bias_, h_.words, scale, out.add, out.decoder_bias);
    hand_out(d_transform_, c * c, scale, out.add, out.transform);
    hand_out(d_transform_ + c * c, c, scale, out.add, out.transform_bias);
    hand_out(d_transform_ + c * c + c, c, scale, out.add, out.gamma);
    hand_out(d_transform_ + c * c + 2 * c, c, scale, out.add, out.beta);
#pragma omp parallel for num_threads(threads_) schedule(static)
    for (long i = 0; i < size; i += c) std::fill_n(out.encoded + i, c, 0.f);
    for (int m = 0; m < p_.count; ++m)
      for (int j = 0; j < c; ++j) out.encoded[place(m) * c + j] += scale * gathered_[m * ld_ + j];
  }

 private:
  // Masked tokens whose scores are there at once, and words that are used up together: the slice's vectors, a
  // tile of scores and the tile's rows of the decoder stay in a second cache.
  static constexpr int kSlice = 240, kTile = 128;
  static constexpr long kTileStride = stride(kTile), kTileSize = kSlice * kTileStride;

  // What a thread tells the others of its words' scores: the highest, and the sum of e^(score - highest).
  struct Share {
    float most[kSlice], sum[kSlice];
  };
  // A thread's own room: its scores for a slice of predictions, tile after tile, as powers and then as gradients;
  // the highest of each row and tile; a tile's words packed, and the slice's vectors, where they must be; and the
  // scores of labels that are among its words.
  struct Room {
    Floats tiles, highest, packed, vectors;
    float of_label[kSlice];
  };

  long place(int m) const {
    const long row = std::min(std::max(p_.masked_positions[m], 0.f), (float)(p_.rows - 1));
    const long column = std::min(std::max(p_.masked_positions[p_.count + m], 0.f), (float)(p_.columns - 1));
    return row * p_.columns + column;
  }
  int label(int m) const { return (int)std::min(std::max(p_.masked_ids[m], 0.f), (float)(h_.words - 1)); }

  // A thread's predictions or words, of so many in all.
  static int share(long count, int thread, int threads) { return (int)(count * thread / threads); }

  void transform() {
    const int c = h_.units;
    Floats weight(packed_size<T>(c, c));
    const Right<T> packed = pack_transposed(h_.transform.weight, c, c, c, weight.as<T>());
#pragma omp parallel num_threads(threads_)
    {
      const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
      const int first = share(p_.count, thread, threads), some = share(p_.count, thread + 1, threads) - first;
      for (int m = first; m < first + some; ++m)
        std::copy_n(p_.encoded + place(m) * c, c, gathered_ + m * ld_);
      multiply<Start::kBias>(some, c, c, {gathered_ + first * ld_, ld_, 1}, packed, before_ + first * ld_, ld_,
                             h_.transform.bias);
      for (int m = first; m < first + some; ++m) {
        activate(h_.activation, before_ + m * ld_, c, after_ + m * ld_);
        statistics_[m] = statistics(after_ + m * ld_, c, h_.epsilon);
        normalize(after_ + m * ld_, c, statistics_[m], h_.norm, ready_ + m * ld_);
      }
    }
  }

  void decode(float* loss, float* hits) {
    std::vector<Share> shares(2 * threads_);  // of this slice and of the one before, which some may still read
    std::vector<double> losses(threads_ * 16), right(threads_ * 16);
    tiles_ = h_.words / threads_ / kTile + 1;
    std::vector<Room> rooms(threads_);
    for (Room& room : rooms) {
      room.tiles = Floats(tiles_ * kTileSize);
      room.highest = Floats(tiles_ * kSlice);
      room.packed = Floats(std::max(packed_size<T>(kTile, h_.units), packed_size<T>(h_.units, kTile)));
      room.vectors = Floats(room_size<T>(h_.units, kSlice));
    }
#pragma omp parallel num_threads(threads_)
    {
      const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
      const Words words{share(h_.words, thread, threads), share(h_.words, thread + 1, threads)};
      Room& own = rooms[thread];
      float log_sums[kSlice];
      int number = 0;
      for (int first = 0; first < p_.count; first += kSlice, ++number) {
        const int some = std::min(kSlice, p_.count - first);
        Share* both = shares.data() + number % 2 * threads;
        make_scores(first, some, words, own, both[thread]);
#pragma omp barrier
        for (int i = 0; i < some; ++i) {
          float most = both[0].most[i], sum = 0;
          for (int t = 1; t < threads; ++t) most = std::max(most, both[t].most[i]);
          for (int t = 0; t < threads; ++t) sum += both[t].sum[i] * exponential(both[t].most[i] - most);
          log_sums[i] = most + std::log(sum);
          const int word = label(first + i);
          if (word < words.first || word >= words.last) continue;
          losses[thread * 16] += log_sums[i] - own.of_label[i];
          right[thread * 16] += own.of_label[i] >= most;
        }
        if (keep_) use_scores(first, some, words, own, log_sums);
      }
    }
    double total = 0, found = 0;
    for (int t = 0; t < threads_; ++t) total += losses[t * 16], found += right[t * 16];
    *loss = (float)total, *hits = (float)found;
  }

  struct Words {
    int first, last;
  };

  // A thread's scores of some predictions, as powers.
  void make_scores(int first, int some, Words words, Room& room, Share& found) const {
    const int c = h_.units;
    for (int tile = words.first, number = 0; tile < words.last; tile += kTile, ++number) {
      const int width = std::min(kTile, words.last - tile);
      const Right<T> weight =
          pack_transposed(h_.decoder.weight + (long)tile * c, c, c, width, room.packed.template as<T>());
      float* out = room.tiles + number * kTileSize;
      multiply<Start::kBias>(some, width, c, {ready_ + first * ld_, ld_, 1}, weight, out, kTileStride,
                             h_.decoder.bias + tile);
      for (int i = 0; i < some; ++i) {
        float* row = out + i * kTileStride;
        const int at = label(first + i) - tile;
        if (at >= 0 && at < width) room.of_label[i] = row[at];
        const float here = largest(row, width);
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int j = 0; j < width; ++j) {
          row[j] = exponential(row[j] - here);
          sum += row[j];
        }
        room.highest[number * kSlice + i] = here;
        const float most = number ? std::max(found.most[i], here) : here;
        const float before = number ? found.sum[i] * exponential(found.most[i] - most) : 0;
        found.most[i] = most, found.sum[i] = before + sum * exponential(here - most);
      }
    }
  }

  // The gradients of the decoder and of its input, from a thread's scores.
  void use_scores(int first, int some, Words words, Room& room, const float* log_sums) {
    const int c = h_.units;
    float* d_ready = d_ready_ + (omp_get_thread_num() * (long)p_.count + first) * ld_;
    const Right<T> vectors = right_side(ready_ + first * ld_, ld_, some, c, room.vectors.template as<T>());
    for (int begin = words.first, number = 0; begin < words.last; begin += kTile, ++number) {
      const int width = std::min(kTile, words.last - begin);
      float* tile = room.tiles + number * kTileSize;
      float* bias = d_bias_ + begin;
      if (first == 0) std::fill_n(bias, width, 0.f);
      for (int i = 0; i < some; ++i) {
        float* row = tile + i * kTileStride;
        const float share = exponential(room.highest[number * kSlice + i] - log_sums[i]);
#pragma omp simd
        for (int j = 0; j < width; ++j) row[j] *= share;
        const int at = label(first + i) - begin;
        if (at >= 0 && at < width) row[at] -= 1;
        add(row, width, bias);
      }
      const Right<T> weight = pack(h_.decoder.weight + (long)begin * c, c, width, c, room.packed.template as<T>());
      const Left<float> by_row{tile, kTileStride, 1}, by_word{tile, 1, kTileStride};
      if (begin == words.first)
        multiply<Start::kZero>(some, c, width, by_row, weight, d_ready, ld_);
      else
        multiply<Start::kAdd>(some, c, width, by_row, weight, d_ready, ld_);
      float* d_weight = d_decoder_ + (long)begin * c;
      if (first == 0)
        multiply<Start::kZero>(width, c, some, by_word, vectors, d_weight, c);
      else
        multiply<Start::kAdd>(width, c, some, by_word, vectors, d_weight, c);
    }
  }

  // From the gradients of the decoder's input to those of the transform and of its input, into gathered_.
  void transform_backward() {
    const int c = h_.units, count = p_.count;
    const size_t size = (size_t)c * c + 3 * c;
    Floats weight(packed_size<T>(c, c)), sums(size * threads_);
    const Right<T> packed = pack(h_.transform.weight, c, c, c, weight.as<T>());
    d_transform_ = Floats(size);
#pragma omp parallel num_threads(threads_)
    {
      const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
      const int first = share(count, thread, threads), some = share(count, thread + 1, threads) - first;
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
      Floats room(room_size<T>(c, some));
      const Right<T> vectors = right_side(gathered_ + first * ld_, ld_, some, c, room.as<T>());
      multiply<Start::kAdd>(c, c, some, {d, 1, ld_}, vectors, own, c);
      multiply<Start::kZero>(some, c, c, {d, ld_, 1}, packed, gathered_ + first * ld_, ld_);
#pragma omp barrier
#pragma omp for schedule(static)
      for (long i = 0; i < (long)size; ++i) {
        d_transform_[i] = sums[i];
        for (int t = 1; t < threads; ++t) d_transform_[i] += sums[t * size + i];
      }
    }
  }

  void hand_out(const float* x, long count, float scale, bool add, float* out) const {
#pragma omp parallel for num_threads(threads_) schedule(static) if (count > 1 << 14)
    for (long i = 0; i < count; ++i) out[i] = (add ? out[i] : 0.f) + scale * x[i];
  }

  Head h_;
  MaskedTokens p_;
  bool keep_;
  int threads_;
  long ld_, tiles_ = 0;
  // (M, C) each: the encoded vectors, then their gradients; the transform before and after its activation; and
  // after its norm, ready for the decoder.
  Floats gathered_, before_, after_, ready_;
  std::vector<Statistics> statistics_;
  Floats d_decoder_, d_bias_, d_ready_, d_transform_;

 public:
  void use(const Head& head, const MaskedTokens& masked) { h_ = head, p_ = masked; }
};

}  // namespace gluon_bert
