// The encoder, forward and backward, over packed rows: nothing is computed for padding.
//
// A thread takes some rows, about kChunk tokens, through a whole layer, so that what a layer makes of them
// stays in its cache. Kept for the backward pass is what cannot be had again cheaply, and the rest is made anew;
// or the stream between the layers alone, from which a layer is then computed again, to the same bits.
#pragma once

#include <omp.h>

#include <cstdint>
#include <vector>

#include "gemm.h"
#include "buffer_pool.h"
#include "elementwise.h"

namespace gluon_bert {

struct Dense {
  const float *weight, *bias;  // (out, in), (out,)
};

struct Layer {
  Dense query, key, value, output;
  Norm norm1;
  Dense expand, project;
  Norm norm2;
};

// The network; pointers are to the parameters of one call.
struct Network {
  int units, ffn_units, heads, positions, words;  // C, F, H, P, V
  bool pre, embedding_norm;
  Activation activation;
  float epsilon, dropout;
  const float *token_embedding, *segment_embedding, *position_embedding;
  Norm first_norm;  // on the embeddings, if embedding_norm
  std::vector<Layer> layers;
  Norm last_norm;  // of a pre-LayerNorm network
};

// Where the gradients go, in the order of Network's parameters. They are added to what is there, or fill it.
struct Gradients {
  bool add;
  float *token_embedding, *segment_embedding, *position_embedding;
  float* first_norm[2];
  std::vector<std::vector<float*>> layers;  // 16 a layer, in the order of Layer
  float* last_norm[2];
};

struct Inputs {
  const float *tokens, *token_types, *valid_length;
  int rows, columns;  // B, T
  uint64_t key;       // of the dropout
};

// What is kept for a backward pass: nothing, the stream, or the layers' inner values as well.
enum class Keep { kNothing, kStream, kLayers };

// T: what products are made of, float or Pair (gemm.h).
template <class T>
class Encoder {
 public:
  // The parameters and inputs must live as long as the call they are used in.
  Encoder(const Network& network, const Inputs& inputs, Keep keep) : keep_(keep) {
    use(network, inputs);
    find_rows();
    if (keep == Keep::kLayers)
      for (int i = 0; i < num_layers(); ++i) inner_.push_back(make_inner(num_tokens_));
    for (int i = 0; i <= (keep == Keep::kNothing ? 1 : num_layers()); ++i) {
      stream_.emplace_back(num_tokens_ * ld_);
      stream_statistics_.emplace_back(num_tokens_);
    }
    if (n_.embedding_norm) {
      embedded_ = Floats(num_tokens_ * ld_);
      embedded_statistics_.resize(num_tokens_);
    }
  }

  // The parameters and inputs of this call: those of the forward pass may lie elsewhere by now.
  void use(const Network& network, const Inputs& inputs) {
    n_ = network, in_ = inputs;
    ld_ = stride(n_.units), ld_ffn_ = stride(n_.ffn_units), ld_qkv_ = stride(3 * n_.units);
  }

  // encoded (B, T, C): the vectors, and zeros on padding.
  void forward(float* encoded) {
    embed();
    Floats packed(layer_size());
    std::vector<Scratch> scratch = make_scratch();
    for (int l = 0; l < num_layers(); ++l) {
#pragma omp parallel num_threads(threads_)
      {
        const Packed weights = pack_layer(n_.layers[l], packed, true);
#pragma omp barrier
        each_chunk([&](const Chunk& chunk) {
          Scratch& own = scratch[omp_get_thread_num()];
          const Record record = record_of(l, chunk, own);
          forward_layer(l, chunk, weights, record, own);
          finish_layer(l, chunk, weights, record, own);
        });
      }
    }
#pragma omp parallel for num_threads(threads_) schedule(static)
    for (int row = 0; row < in_.rows; ++row) {
      const Row r = rows_[row];
      float* out = encoded + (long)row * in_.columns * n_.units;
      for (int i = 0; i < r.length; ++i, out += n_.units)
        normalize(stream(num_layers()) + (r.first + i) * ld_, n_.units,
                  stream_statistics(num_layers())[r.first + i], *norm_after(num_layers()), out);
      std::memset(out, 0, sizeof(float) * (in_.columns - r.length) * n_.units);
    }
  }

  // gradient: of encoded, (B, T, C).
  void backward(const float* gradient, const Gradients& out) {
    const bool again = keep_ == Keep::kStream;
    Floats packed(layer_size()), packed_forward(again ? layer_size() : 0);
    Floats d_stream(num_tokens_ * ld_), sums((size_t)threads_ * sums_size());
    std::vector<Scratch> scratch = make_scratch();
#pragma omp parallel num_threads(threads_)
    {
      float* own = sums + omp_get_thread_num() * sums_size();
      std::fill_n(own, sums_size(), 0.f);
      const Norm norm = *norm_after(num_layers());
      each_chunk([&](const Chunk& chunk) {
        for (int row = chunk.first_row; row < chunk.last_row; ++row)
          for (int i = 0; i < rows_[row].length; ++i) {
            const long token = rows_[row].first + i;
            normalize_backward(stream(num_layers()) + token * ld_,
                               gradient + ((long)row * in_.columns + i) * n_.units, n_.units,
                               stream_statistics(num_layers())[token], norm, d_stream + token * ld_, own,
                               own + n_.units);
          }
      });
#pragma omp barrier
      add_up(sums, 0, n_.units, gamma_after(out, num_layers())[0], out.add);
      add_up(sums, n_.units, n_.units, gamma_after(out, num_layers())[1], out.add);
    }
    for (int l = num_layers() - 1; l >= 0; --l) {
#pragma omp parallel num_threads(threads_)
      {
        Sums own(sums + omp_get_thread_num() * sums_size(), n_.units, n_.ffn_units);
        std::fill_n(own.begin, sums_size(), 0.f);
        const Packed weights = pack_layer(n_.layers[l], packed, false);
        const Packed forward_weights = again ? pack_layer(n_.layers[l], packed_forward, true) : Packed();
#pragma omp barrier
        each_chunk([&](const Chunk& chunk) {
          Scratch& room = scratch[omp_get_thread_num()];
          const Record record = record_of(l, chunk, room);
          if (again) forward_layer(l, chunk, forward_weights, record, room);
          backward_layer(l, chunk, weights, d_stream, own, record, room);
        });
#pragma omp barrier
        hand_out(sums, l, out);
      }
    }
    embed_backward(d_stream, sums, out);
  }

 private:
  static constexpr int kChunk = 128;  // tokens, so that a layer's activations of them fit a second cache

  struct Row {
    long first;  // its first token among all
    int length;
  };
  struct Chunk {
    int first_row, last_row;
    long first;
    int tokens;
  };
  struct Packed {
    Right<T> qkv, output, expand, project;
  };
  // Inner values of a layer, a row a token: query, key and value; what attention found; the sum after attention;
  // the hidden layer before its activation.
  struct Inner {
    Floats qkv, context, middle, hidden;
    std::vector<Statistics> middle_statistics;
  };
  // Those of a chunk, from its first token on.
  struct Record {
    float *qkv, *context, *middle, *hidden;
    Statistics* middle_statistics;
  };
  // A thread's own room for a chunk.
  struct Scratch {
    Floats input, after, gradient, wide, qkv, scores, dropped, d_scores, panels;
    Inner inner;  // if not all layers' are kept
  };
  // A thread's own sums of a layer's gradients, one after another.
  struct Sums {
    float *begin, *qkv, *qkv_bias, *output, *output_bias, *expand, *expand_bias, *project, *project_bias;
    float *middle_gamma, *middle_beta, *after_gamma, *after_beta;

    Sums(float* data, long c, long f) : begin(data) {
      auto next = [&data](long count) {
        float* here = data;
        data += count;
        return here;
      };
      qkv = next(3 * c * c), qkv_bias = next(3 * c), output = next(c * c), output_bias = next(c);
      expand = next(f * c), expand_bias = next(f), project = next(c * f), project_bias = next(c);
      middle_gamma = next(c), middle_beta = next(c), after_gamma = next(c), after_beta = next(c);
    }
    static size_t size(size_t c, size_t f) { return 4 * c * c + 2 * c * f + 9 * c + f + 16; }
  };

  static T* panels_of(const Scratch& s) { return s.panels.template as<T>(); }
  int num_layers() const { return (int)n_.layers.size(); }
  size_t sums_size() const { return Sums::size(n_.units, n_.ffn_units); }
  int head_size() const { return n_.units / n_.heads; }

  // The values between the layers: 0 what enters the first one, l what leaves layer l - 1, before its norm.
  float* stream(int l) const { return stream_[kept(l)]; }
  Statistics* stream_statistics(int l) { return stream_statistics_[kept(l)].data(); }
  int kept(int l) const { return keep_ == Keep::kNothing ? l > 0 : l; }

  Inner make_inner(long tokens) const {
    return {Floats(tokens * ld_qkv_), Floats(tokens * ld_), Floats(tokens * ld_), Floats(tokens * ld_ffn_),
            std::vector<Statistics>(tokens)};
  }
  Record record_of(int l, const Chunk& chunk, Scratch& s) {
    const bool all = keep_ == Keep::kLayers;
    Inner& inner = all ? inner_[l] : s.inner;
    const long first = all ? chunk.first : 0;
    return {inner.qkv + first * ld_qkv_, inner.context + first * ld_, inner.middle + first * ld_,
            inner.hidden + first * ld_ffn_, inner.middle_statistics.data() + first};
  }

  // The norm that stream l goes through, or null.
  const Norm* norm_after(int l) const {
    if (n_.pre) return l < num_layers() ? &n_.layers[l].norm1 : &n_.last_norm;
    return l > 0 ? &n_.layers[l - 1].norm2 : nullptr;
  }
  float* const* gamma_after(const Gradients& out, int l) const {
    if (n_.pre) return l < num_layers() ? &out.layers[l][kNorm1] : out.last_norm;
    return &out.layers[l - 1][kNorm2];
  }
  const Norm& middle_norm(int l) const { return n_.pre ? n_.layers[l].norm2 : n_.layers[l].norm1; }
  // The places of the norms among a layer's parameters.
  static constexpr int kNorm1 = 8, kNorm2 = 14;

  Dropout dropout(int place) const { return {n_.dropout, in_.key, (uint64_t)place}; }
  Dropout dropout(int layer, int place) const { return dropout(1 + 3 * layer + place); }
  // The number of a token's first element for the dropout, which padding changes, but not the packing.
  uint32_t number(int row, int position) const {
    return (uint32_t)(((long)row * in_.columns + position) * n_.units);
  }

  void find_rows() {
    num_tokens_ = 0;
    for (int row = 0; row < in_.rows; ++row) {
      const float length = in_.valid_length[row];
      const int known = length > 0 ? (int)std::min(length, (float)in_.columns) : 0;  // also of NaN
      rows_.push_back({num_tokens_, known});
      if (chunks_.empty() || chunks_.back().tokens + known > kChunk)
        chunks_.push_back({row, row, num_tokens_, 0});
      chunks_.back().last_row = row + 1;
      chunks_.back().tokens += known;
      largest_chunk_ = std::max(largest_chunk_, chunks_.back().tokens);
      longest_ = std::max(longest_, known);
      num_tokens_ += known;
    }
    threads_ = std::max(1, std::min(omp_get_max_threads(), (int)chunks_.size()));
  }

  // Always the same chunks for the same thread, so that sums over threads repeat to the bit.
  template <class Work>
  void each_chunk(Work work) const {
    const long count = (long)chunks_.size(), thread = omp_get_thread_num(), threads = omp_get_num_threads();
    for (long i = count * thread / threads; i < count * (thread + 1) / threads; ++i) work(chunks_[i]);
  }

  // What the threads added up from `begin` on, together; each thread does a part.
  void add_up(const float* sums, long begin, long count, float* out, bool to_what_is_there) const {
    const long threads = omp_get_num_threads(), thread = omp_get_thread_num();
    const long first = count * thread / threads, last = count * (thread + 1) / threads;
    if (!to_what_is_there) std::fill(out + first, out + last, 0.f);
    for (long t = 0; t < threads; ++t)
      add(sums + t * (long)sums_size() + begin + first, (int)(last - first), out + first);
  }

  std::vector<Scratch> make_scratch() const {
    std::vector<Scratch> all(threads_);
    const long tokens = largest_chunk_, scores = (long)longest_ * stride(panels(longest_) * kCols);
    for (Scratch& s : all) {
      for (Floats* one : {&s.input, &s.after, &s.gradient}) *one = Floats(tokens * ld_);
      s.wide = Floats(tokens * ld_ffn_);
      s.qkv = Floats(tokens * ld_qkv_);
      for (Floats* one : {&s.scores, &s.dropped, &s.d_scores}) *one = Floats(scores);
      s.panels = Floats(std::max(packed_size<T>(longest_, head_size()),
                                 room_size<T>(std::max(n_.units, n_.ffn_units), largest_chunk_)));
      if (keep_ != Keep::kLayers) s.inner = make_inner(tokens);
    }
    return all;
  }

  // The elements of a layer's packed weights, for the forward and for the backward pass.
  size_t layer_size() const {
    const int c = n_.units, f = n_.ffn_units;
    return std::max(packed_size<T>(3 * c, c), packed_size<T>(c, 3 * c)) + packed_size<T>(c, c) +
           2 * std::max(packed_size<T>(f, c), packed_size<T>(c, f));
  }

  // A layer's weights in panels, for x * weight^T or, backward, for gradient * weight. Shared among the threads.
  Packed pack_layer(const Layer& layer, const Floats& room, bool forward) const {
    const int c = n_.units, f = n_.ffn_units;
    T* out = room.as<T>();
    int number = 0;
    auto mine = [&number] { return number++ % omp_get_num_threads() == omp_get_thread_num(); };
    auto pack_one = [&](auto rows, int outputs, int inputs) {
      const int depth = forward ? inputs : outputs, columns = forward ? outputs : inputs;
      const Right<T> packed{out, kCols, packed_size<T>(kCols, depth)};
      for (int p = 0; p < panels(columns); ++p) {
        if (!mine()) continue;
        if (forward)
          pack_panel_transposed(rows, depth, columns, p, out);
        else
          pack_panel(rows, depth, columns, p, out);
      }
      out += packed_size<T>(columns, depth);
      return packed;
    };
    // Query, key and value are one matrix (3 C, C).
    const float* three[] = {layer.query.weight, layer.key.weight, layer.value.weight};
    Packed packed;
    packed.qkv = pack_one([&](int i) { return three[i / c] + i % c * (long)c; }, 3 * c, c);
    packed.output = pack_one(rows_of(layer.output.weight, c), c, c);
    packed.expand = pack_one(rows_of(layer.expand.weight, c), f, c);
    packed.project = pack_one(rows_of(layer.project.weight, f), c, f);
    return packed;
  }

  void embed() {
    const Dropout drop = dropout(0);
    const int c = n_.units;
#pragma omp parallel for num_threads(threads_) schedule(static)
    for (int row = 0; row < in_.rows; ++row)
      for (int i = 0; i < rows_[row].length; ++i) {
        const long token = rows_[row].first + i, place = (long)row * in_.columns + i;
        const float* word = n_.token_embedding + word_at(place) * c;
        const float* segment = n_.segment_embedding + segment_at(place) * c;
        const float* position = n_.position_embedding + (long)i * c;
        float* out = (n_.embedding_norm ? embedded_.get() : stream(0)) + token * ld_;
        for (int j = 0; j < c; ++j) out[j] = word[j] + segment[j] + position[j];
        if (n_.embedding_norm) {
          embedded_statistics_[token] = statistics(out, c, n_.epsilon);
          float* normalized = stream(0) + token * ld_;
          normalize(out, c, embedded_statistics_[token], n_.first_norm, normalized);
          drop.apply(normalized, c, number(row, i), normalized);
        }
        if (n_.pre) stream_statistics(0)[token] = statistics(stream(0) + token * ld_, c, n_.epsilon);
      }
  }

  // As MXNet's Embedding has it, ids outside are taken for the nearest.
  long word_at(long place) const { return id(in_.tokens[place], n_.words); }
  long segment_at(long place) const { return id(in_.token_types[place], 2); }
  static long id(float value, int count) { return value > 0 ? (long)std::min(value, (float)(count - 1)) : 0; }

  // What a layer's attention reads: stream l through its norm.
  const float* layer_input(int l, const Chunk& chunk, float* out) {
    const Norm* norm = norm_after(l);
    const float* x = stream(l) + chunk.first * ld_;
    if (!norm) return x;
    for (int i = 0; i < chunk.tokens; ++i)
      normalize(x + i * ld_, n_.units, stream_statistics(l)[chunk.first + i], *norm, out + i * ld_);
    return out;
  }

  // What a layer's feed-forward network reads.
  void ffn_input(int l, const Chunk& chunk, const Record& r, float* out) const {
    for (int i = 0; i < chunk.tokens; ++i)
      normalize(r.middle + i * ld_, n_.units, r.middle_statistics[i], middle_norm(l), out + i * ld_);
  }

  // A layer up to its hidden layer: all that the backward pass wants. Not inlined, so that what is computed twice
  // is computed by the same instructions.
  __attribute__((noinline)) void forward_layer(int l, const Chunk& chunk, const Packed& weights, const Record& r,
                                               Scratch& s) {
    const int c = n_.units, f = n_.ffn_units, tokens = chunk.tokens;
    const Layer& layer = n_.layers[l];
    const float* input = layer_input(l, chunk, s.input);
    float* qkv = r.qkv;
    multiply<Start::kZero>(tokens, 3 * c, c, {input, ld_, 1}, weights.qkv, qkv, ld_qkv_);
    for (int i = 0; i < tokens; ++i) {
      add(layer.query.bias, c, qkv + i * ld_qkv_);
      add(layer.key.bias, c, qkv + i * ld_qkv_ + c);
      add(layer.value.bias, c, qkv + i * ld_qkv_ + 2 * c);
    }
    for (int row = chunk.first_row; row < chunk.last_row; ++row)
      for (int head = 0; head < n_.heads; ++head) attend(l, row, head, chunk, r, s);
    multiply<Start::kBias>(tokens, c, c, {r.context, ld_, 1}, weights.output, s.after, ld_, layer.output.bias);
    const float* residual = n_.pre ? stream(l) + chunk.first * ld_ : input;
    add_residual(chunk, dropout(l, 1), s.after, residual, r.middle, r.middle_statistics);
    ffn_input(l, chunk, r, s.gradient);
    multiply<Start::kBias>(tokens, f, c, {s.gradient, ld_, 1}, weights.expand, r.hidden, ld_ffn_, layer.expand.bias);
  }

  // From there to the stream that leaves the layer; s.gradient is still what the feed-forward network read.
  void finish_layer(int l, const Chunk& chunk, const Packed& weights, const Record& r, Scratch& s) {
    const int c = n_.units, f = n_.ffn_units, tokens = chunk.tokens;
    for (int i = 0; i < tokens; ++i) activate(n_.activation, r.hidden + i * ld_ffn_, f, s.wide + i * ld_ffn_);
    multiply<Start::kBias>(tokens, c, f, {s.wide, ld_ffn_, 1}, weights.project, s.after, ld_,
                           n_.layers[l].project.bias);
    add_residual(chunk, dropout(l, 2), s.after, n_.pre ? r.middle : s.gradient.get(),
                 stream(l + 1) + chunk.first * ld_, stream_statistics(l + 1) + chunk.first);
  }

  // out = residual + dropout(x), and the statistics of each row for the norm that follows.
  void add_residual(const Chunk& chunk, const Dropout& drop, float* x, const float* residual, float* out,
                    Statistics* found) {
    long i = 0;
    for (int row = chunk.first_row; row < chunk.last_row; ++row)
      for (int position = 0; position < rows_[row].length; ++position, ++i) {
        drop.apply(x + i * ld_, n_.units, number(row, position), x + i * ld_);
        for (int j = 0; j < n_.units; ++j) out[i * ld_ + j] = residual[i * ld_ + j] + x[i * ld_ + j];
        found[i] = statistics(out + i * ld_, n_.units, n_.epsilon);
      }
  }

  // The attention weights of a row's head, (length, length) with the stride returned, without dropout.
  long weights_of(const float* query, int t, Scratch& s) const {
    const int d = head_size(), padded = panels(t) * kCols;
    const long ld = stride(padded);
    const Right<T> keys = pack_transposed(query + n_.units, ld_qkv_, d, t, panels_of(s));
    multiply<Start::kZero>(t, padded, d, {query, ld_qkv_, 1}, keys, s.scores, ld);
    for (int i = 0; i < t; ++i) softmax(s.scores + i * ld, t, attention_scale());
    return ld;
  }

  float attention_scale() const { return 1 / std::sqrt((float)head_size()); }

  uint32_t score_number(int row, int head, int i) const {
    return (uint32_t)((((long)row * n_.heads + head) * in_.columns + i) * in_.columns);
  }

  void attend(int l, int row, int head, const Chunk& chunk, const Record& r, Scratch& s) const {
    const int t = rows_[row].length, d = head_size();
    const long local = rows_[row].first - chunk.first;
    const float* query = r.qkv + local * ld_qkv_ + head * d;
    const long ld = weights_of(query, t, s);
    const Dropout drop = dropout(l, 0);
    for (int i = 0; i < t; ++i) drop.apply(s.scores + i * ld, t, score_number(row, head, i), s.scores + i * ld);
    multiply<Start::kZero>(t, d, t, {s.scores, ld, 1}, right_side(query + 2 * n_.units, ld_qkv_, t, d, panels_of(s)),
                           r.context + local * ld_ + head * d, ld_);
  }

  // The gradients of query, key and value, into s.qkv, from those of the context, in s.after.
  void attend_backward(int l, int row, int head, const Chunk& chunk, const Record& r, Scratch& s) const {
    const int t = rows_[row].length, d = head_size(), padded = panels(t) * kCols;
    const long local = rows_[row].first - chunk.first;
    const float* query = r.qkv + local * ld_qkv_ + head * d;
    const long ld = weights_of(query, t, s);
    const float* key = query + n_.units;
    const float* value = key + n_.units;
    const float* gradient = s.after + local * ld_ + head * d;
    float* d_query = s.qkv + local * ld_qkv_ + head * d;
    const Dropout drop = dropout(l, 0);
    for (int i = 0; i < t; ++i) drop.apply(s.scores + i * ld, t, score_number(row, head, i), s.dropped + i * ld);
    multiply<Start::kZero>(t, d, t, {s.dropped, 1, ld}, right_side(gradient, ld_, t, d, panels_of(s)),
                           d_query + 2 * n_.units, ld_qkv_);
    const Right<T> values = pack_transposed(value, ld_qkv_, d, t, panels_of(s));
    multiply<Start::kZero>(t, padded, d, {gradient, ld_, 1}, values, s.d_scores, ld);
    for (int i = 0; i < t; ++i) {
      float* row_gradient = s.d_scores + i * ld;
      drop.apply(row_gradient, t, score_number(row, head, i), row_gradient);
      softmax_backward(s.scores + i * ld, t, attention_scale(), row_gradient);
    }
    multiply<Start::kZero>(t, d, t, {s.d_scores, ld, 1}, right_side(key, ld_qkv_, t, d, panels_of(s)), d_query,
                           ld_qkv_);
    multiply<Start::kZero>(t, d, t, {s.d_scores, 1, ld}, right_side(query, ld_qkv_, t, d, panels_of(s)),
                           d_query + n_.units, ld_qkv_);
  }

  // d_stream holds the gradient of stream l + 1 and gets that of stream l.
  void backward_layer(int l, const Chunk& chunk, const Packed& weights, float* d_stream, Sums& sums, const Record& r,
                      Scratch& s) {
    const int c = n_.units, f = n_.ffn_units, tokens = chunk.tokens;
    float* gradient = d_stream + chunk.first * ld_;
    // The feed-forward network.
    drop_rows(chunk, dropout(l, 2), gradient, s.after);
    for (int i = 0; i < tokens; ++i) activate(n_.activation, r.hidden + i * ld_ffn_, f, s.wide + i * ld_ffn_);
    add_weights(tokens, c, f, s.after, ld_, s.wide, ld_ffn_, sums.project, sums.project_bias, panels_of(s));
    multiply<Start::kZero>(tokens, f, c, {s.after, ld_, 1}, weights.project, s.wide, ld_ffn_);
    for (int i = 0; i < tokens; ++i)
      activate_backward(n_.activation, r.hidden + i * ld_ffn_, f, s.wide + i * ld_ffn_);
    ffn_input(l, chunk, r, s.input);
    add_weights(tokens, f, c, s.wide, ld_ffn_, s.input, ld_, sums.expand, sums.expand_bias, panels_of(s));
    multiply<Start::kZero>(tokens, c, f, {s.wide, ld_ffn_, 1}, weights.expand, s.after, ld_);
    // Its input's norm; a residual goes around the norm or past both.
    for (int i = 0; i < tokens; ++i) {
      float* d_input = s.after + i * ld_;
      if (!n_.pre) add(gradient + i * ld_, c, d_input);
      normalize_backward(r.middle + i * ld_, d_input, c, r.middle_statistics[i], middle_norm(l), d_input,
                         sums.middle_gamma, sums.middle_beta);
      if (n_.pre) add(gradient + i * ld_, c, d_input);
      std::copy_n(d_input, c, gradient + i * ld_);
    }
    // Attention.
    drop_rows(chunk, dropout(l, 1), gradient, s.gradient);
    add_weights(tokens, c, c, s.gradient, ld_, r.context, ld_, sums.output, sums.output_bias, panels_of(s));
    multiply<Start::kZero>(tokens, c, c, {s.gradient, ld_, 1}, weights.output, s.after, ld_);
    for (int row = chunk.first_row; row < chunk.last_row; ++row)
      for (int head = 0; head < n_.heads; ++head) attend_backward(l, row, head, chunk, r, s);
    const float* input = layer_input(l, chunk, s.input);
    add_weights(tokens, 3 * c, c, s.qkv, ld_qkv_, input, ld_, sums.qkv, sums.qkv_bias, panels_of(s));
    multiply<Start::kZero>(tokens, c, 3 * c, {s.qkv, ld_qkv_, 1}, weights.qkv, s.after, ld_);
    const Norm* norm = norm_after(l);
    for (int i = 0; i < tokens; ++i) {
      const long token = chunk.first + i;
      float* d_input = s.after + i * ld_;
      if (!n_.pre) add(gradient + i * ld_, c, d_input);
      if (norm)
        normalize_backward(stream(l) + token * ld_, d_input, c, stream_statistics(l)[token], *norm, d_input,
                           sums.after_gamma, sums.after_beta);
      if (n_.pre) add(gradient + i * ld_, c, d_input);
      std::copy_n(d_input, c, gradient + i * ld_);
    }
  }

  void drop_rows(const Chunk& chunk, const Dropout& drop, const float* x, float* out) const {
    long i = 0;
    for (int row = chunk.first_row; row < chunk.last_row; ++row)
      for (int position = 0; position < rows_[row].length; ++position, ++i)
        drop.apply(x + i * ld_, n_.units, number(row, position), out + i * ld_);
  }

  // weight (outputs, inputs) += gradient^T * x; bias += the sum of the gradients.
  static void add_weights(int tokens, int outputs, int inputs, const float* gradient, long ld_gradient, const float* x,
                          long ld_x, float* weight, float* bias, T* room) {
    multiply<Start::kAdd>(outputs, inputs, tokens, {gradient, 1, ld_gradient},
                          right_side(x, ld_x, tokens, inputs, room), weight, inputs);
    for (int i = 0; i < tokens; ++i) add(gradient + i * ld_gradient, outputs, bias);
  }

  // The sums over the threads, to where they belong.
  void hand_out(const float* sums, int l, const Gradients& out) const {
    const long c = n_.units, f = n_.ffn_units;
    const std::vector<float*>& g = out.layers[l];
    const Sums own((float*)sums, c, f);
    auto give = [&](const float* begin, long count, float* to) { add_up(sums, begin - sums, count, to, out.add); };
    for (int i = 0; i < 3; ++i) {
      give(own.qkv + i * c * c, c * c, g[2 * i]);
      give(own.qkv_bias + i * c, c, g[2 * i + 1]);
    }
    give(own.output, c * c, g[6]);
    give(own.output_bias, c, g[7]);
    give(own.middle_gamma, c, g[n_.pre ? kNorm2 : kNorm1]);
    give(own.middle_beta, c, g[(n_.pre ? kNorm2 : kNorm1) + 1]);
    give(own.expand, f * c, g[10]);
    give(own.expand_bias, f, g[11]);
    give(own.project, c * f, g[12]);
    give(own.project_bias, c, g[13]);
    if (norm_after(l)) {
      give(own.after_gamma, c, gamma_after(out, l)[0]);
      give(own.after_beta, c, gamma_after(out, l)[1]);
    }
  }

  void embed_backward(float* d_stream, float* sums, const Gradients& out) {
    const int c = n_.units;
    const Dropout drop = dropout(0);
#pragma omp parallel num_threads(threads_)
    {
      if (n_.embedding_norm) {
        float* own = sums + omp_get_thread_num() * sums_size();
        std::fill_n(own, 2 * c, 0.f);
        each_chunk([&](const Chunk& chunk) {
          drop_rows(chunk, drop, d_stream + chunk.first * ld_, d_stream + chunk.first * ld_);
          for (long token = chunk.first; token < chunk.first + chunk.tokens; ++token)
            normalize_backward(embedded_ + token * ld_, d_stream + token * ld_, c, embedded_statistics_[token],
                               n_.first_norm, d_stream + token * ld_, own, own + c);
        });
#pragma omp barrier
        add_up(sums, 0, c, out.first_norm[0], out.add);
        add_up(sums, c, c, out.first_norm[1], out.add);
      }
#pragma omp for schedule(static)
      for (int word = 0; word < (out.add ? 0 : n_.words); ++word)
        std::fill_n(out.token_embedding + (long)word * c, c, 0.f);
#pragma omp for schedule(static)
      for (int i = 0; i < (out.add ? 0 : n_.positions); ++i) std::fill_n(out.position_embedding + (long)i * c, c, 0.f);
#pragma omp single
      if (!out.add) std::fill_n(out.segment_embedding, 2 * c, 0.f);
      // A thread has columns of its own of every table, since a word may stand in any row.
      const int threads = omp_get_num_threads(), thread = omp_get_thread_num();
      const int first = c * thread / threads, some = c * (thread + 1) / threads - first;
      for (int row = 0; row < in_.rows; ++row)
        for (int i = 0; i < rows_[row].length; ++i) {
          const float* gradient = d_stream + (rows_[row].first + i) * ld_ + first;
          const long place = (long)row * in_.columns + i;
          add(gradient, some, out.token_embedding + word_at(place) * c + first);
          add(gradient, some, out.segment_embedding + segment_at(place) * c + first);
          add(gradient, some, out.position_embedding + (long)i * c + first);
        }
    }
  }

  Network n_;
  Inputs in_;
  Keep keep_;
  int threads_ = 1, largest_chunk_ = 1, longest_ = 1;
  long num_tokens_ = 0, ld_ = 0, ld_ffn_ = 0, ld_qkv_ = 0;
  std::vector<Row> rows_;
  std::vector<Chunk> chunks_;
  std::vector<Inner> inner_;    // of each layer, if they are kept
  std::vector<Floats> stream_;  // between the layers, a row a token
  std::vector<std::vector<Statistics>> stream_statistics_;
  Floats embedded_;
  std::vector<Statistics> embedded_statistics_;
};

}  // namespace gluon_bert
