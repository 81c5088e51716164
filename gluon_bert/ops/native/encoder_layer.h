// One encoder layer, forward and backward, for some rows of a batch, on one thread.
//
// encoder.h decides which thread computes which rows, and what stays in memory between the passes.
#pragma once

#include <omp.h>

#include <cstdint>
#include <vector>

#include "buffer_pool.h"
#include "elementwise.h"
#include "gemm.h"
#include "relative_position.h"

namespace gluon_bert {

struct Dense {
  const float *weight, *bias;  // (out, in), (out,)
};

struct Layer {
  Dense query, key, value, output;
  Norm norm1;
  Dense expand, project;
  Norm norm2;
  const float* relative_bias;  // (kNumBuckets, H), or null
};

// The network. Its pointers are to the parameters of one call.
struct Network {
  int units, ffn_units, heads, positions, words;  // C, F, H, P, V
  bool pre, embedding_norm, relative;
  Activation activation;
  float epsilon, dropout;
  const float *token_embedding, *token_type_embedding, *position_embedding;
  Norm first_norm;  // on the embeddings, if embedding_norm
  std::vector<Layer> layers;
  Norm last_norm;  // of a pre-LayerNorm network

  int num_layers() const { return (int)layers.size(); }
  int head_size() const { return units / heads; }
  // The norm between stream l and layer l, or null. Stream num_layers() leaves the last layer.
  const Norm* norm_after(int l) const {
    if (pre) return l < num_layers() ? &layers[l].norm1 : &last_norm;
    return l > 0 ? &layers[l - 1].norm2 : nullptr;
  }
  const Norm& middle_norm(int l) const { return pre ? layers[l].norm2 : layers[l].norm1; }
};

struct Inputs {
  const float *tokens, *token_types, *valid_length;
  int rows, columns;  // B, T
  uint64_t key;       // of the dropout
  // If `select`, the positions whose vectors the caller reads, (2, N) rows above columns. Otherwise it reads all.
  bool select;
  const float* output_positions;
  int num_outputs;  // N
};

// A row's real tokens, among the packed tokens of all rows.
struct Row {
  long first;
  int length;
};

// Rows that one thread takes through a whole layer.
struct Chunk {
  int first_row, last_row;
  long first;
  int tokens;
};

// The tokens whose vectors a layer computes, in the order of the packed tokens. They are all, or in the last layer
// those that the caller reads.
struct Queries {
  bool all;
  std::vector<Row> rows;       // each row's queries among the packed queries of all rows
  std::vector<int> positions;  // of each query in its row

  // The number of a chunk's first query, and how many it has.
  long first(const Chunk& chunk) const { return rows[chunk.first_row].first; }
  int count(const Chunk& chunk) const {
    const Row last = rows[chunk.last_row - 1];
    return (int)(last.first + last.length - first(chunk));
  }
  // Calls work(number, row, position) for each query of a chunk; its first query has number 0.
  template <class Work>
  void each(const Chunk& chunk, Work work) const {
    for (int row = chunk.first_row; row < chunk.last_row; ++row)
      for (long i = rows[row].first; i < rows[row].first + rows[row].length; ++i)
        work(i - first(chunk), row, positions[i]);
  }
};

// One call of the encoder: network, inputs, packed rows, and the distances of two tokens' vectors in memory.
struct Call {
  Network net;
  Inputs in;
  std::vector<Row> rows;
  long ld = 0, ld_ffn = 0, ld_kv = 0;  // of vectors of C, F and 2 C numbers

  // Places of dropout: 0 is on the embeddings; then each layer has three, the attention weights first.
  Dropout dropout(int place) const { return {net.dropout, in.key, (uint64_t)place}; }
  Dropout dropout(int layer, int place) const { return dropout(1 + 3 * layer + place); }
  // The number of a token's first element for dropout. It depends on padding, but not on the packing.
  uint32_t element(int row, int position) const {
    return (uint32_t)(((long)row * in.columns + position) * net.units);
  }
  // The number of the first attention weight of a query.
  uint32_t weight_element(int row, int head, int query) const {
    return (uint32_t)((((long)row * net.heads + head) * in.columns + query) * in.columns);
  }
  // out = x after dropout, the vectors of a chunk's queries.
  void drop_rows(const Queries& queries, const Chunk& chunk, const Dropout& drop, const float* x, float* out) const {
    queries.each(chunk, [&](long i, int row, int position) {
      drop.apply(x + i * ld, net.units, element(row, position), out + i * ld);
    });
  }
};

// A layer's weights in panels, for x * weight^T or, backward, for gradient * weight.
template <class T>
struct PackedLayer {
  Right<T> query, key_value, output, expand, project;
  const float* key_value_bias;  // (2 C,)

  // The elements that `pack` fills, forward or backward.
  static size_t size(int c, int f) {
    return 2 * c + std::max(packed_size<T>(2 * c, c), packed_size<T>(c, 2 * c)) + 2 * packed_size<T>(c, c) +
           2 * std::max(packed_size<T>(f, c), packed_size<T>(c, f));
  }

  // All threads call this together; each packs some panels.
  static PackedLayer pack(const Layer& layer, int c, int f, T* out, bool forward) {
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
    // Key and value are one matrix (2 C, C), and one bias.
    float* bias = reinterpret_cast<float*>(out);
    out += 2 * c;
    if (mine()) std::copy_n(layer.value.bias, c, std::copy_n(layer.key.bias, c, bias));
    PackedLayer packed;
    packed.key_value_bias = bias;
    packed.key_value = pack_one(
        [&](int i) { return (i < c ? layer.key : layer.value).weight + i % c * (long)c; }, 2 * c, c);
    packed.query = pack_one(rows_of(layer.query.weight, c), c, c);
    packed.output = pack_one(rows_of(layer.output.weight, c), c, c);
    packed.expand = pack_one(rows_of(layer.expand.weight, c), f, c);
    packed.project = pack_one(rows_of(layer.project.weight, f), c, f);
    return packed;
  }
};

// Values between two layers, before their norm: a vector per token, and each vector's statistics. The last layer's
// output has a vector per query.
struct Stream {
  float* values;
  Statistics* statistics;
};

// A layer's inner values. A vector per token: key and value. A vector per query: the query; attention's result; the
// sum after attention; the hidden layer before its activation.
struct Activations {
  PooledBuffer key_value, query, context, middle, hidden;
  std::vector<Statistics> middle_statistics;

  Activations() = default;
  Activations(long tokens, long queries, const Call& call)
      : key_value(tokens * call.ld_kv),
        query(queries * call.ld),
        context(queries * call.ld),
        middle(queries * call.ld),
        hidden(queries * call.ld_ffn),
        middle_statistics(queries) {}
};

// Those of a chunk.
struct ChunkActivations {
  float *key_value, *query, *context, *middle, *hidden;
  Statistics* middle_statistics;

  // The chunk's first token is token number `first` of all, and its first query is query number `first_query`.
  ChunkActivations(Activations& all, long first, long first_query, const Call& call)
      : key_value(all.key_value + first * call.ld_kv),
        query(all.query + first_query * call.ld),
        context(all.context + first_query * call.ld),
        middle(all.middle + first_query * call.ld),
        hidden(all.hidden + first_query * call.ld_ffn),
        middle_statistics(all.middle_statistics.data() + first_query) {}
};

// A thread's working memory for a chunk.
struct Scratch {
  PooledBuffer input, after, gradient, wide, d_query, d_key_value, scores, dropped, d_scores, panels, distances;
  Activations activations;  // if not all layers' are kept

  Scratch() = default;
  Scratch(const Call& call, long tokens, long longest, long panel_elements, bool backward) {
    const long matrix = longest * stride(gluon_bert::panels((int)longest) * kCols);
    for (PooledBuffer* one : {&input, &after, &gradient}) *one = PooledBuffer(tokens * call.ld);
    scores = PooledBuffer(matrix);
    panels = PooledBuffer(panel_elements);
    distances = PooledBuffer(2 * longest);
    if (!backward) return;
    wide = PooledBuffer(tokens * call.ld_ffn);
    d_query = PooledBuffer(tokens * call.ld);
    d_key_value = PooledBuffer(tokens * call.ld_kv);
    for (PooledBuffer* one : {&dropped, &d_scores}) *one = PooledBuffer(matrix);
  }
};

// A thread's own sums of a layer's gradients, one after another. The rows of weights are ld or ld_ffn apart.
struct LayerGradients {
  float *qkv, *output, *expand, *project;
  float *qkv_bias, *output_bias, *expand_bias, *project_bias;
  float *middle_gamma, *middle_beta, *after_gamma, *after_beta, *relative_bias, *end;
  // Whether the thread's first chunk is still to come. Its gradients of weights replace what the memory holds.
  bool empty = true;

  LayerGradients(float* data, const Call& call) {
    const Network& net = call.net;
    const long c = net.units, f = net.ffn_units;
    auto next = [&data](long count) {
      float* here = data;
      data += count;
      return here;
    };
    qkv = next(3 * c * call.ld), output = next(c * call.ld), expand = next(f * call.ld);
    project = next(c * call.ld_ffn);
    qkv_bias = next(3 * c), output_bias = next(c), expand_bias = next(f), project_bias = next(c);
    middle_gamma = next(c), middle_beta = next(c), after_gamma = next(c), after_beta = next(c);
    relative_bias = next(net.relative * kNumBuckets * net.heads), end = next(0);
  }
  static size_t size(const Call& call) {
    const size_t c = call.net.units, f = call.net.ffn_units;
    return (4 * c + f) * call.ld + c * call.ld_ffn + 9 * c + f +
           call.net.relative * kNumBuckets * call.net.heads + 16;
  }
  void clear_vectors() const { std::fill(qkv_bias, end, 0.f); }
  Start start() const { return empty ? kZero : kAdd; }
};

// Layer number `l` in one call. T: what products are made of, float or Bf16x2 (gemm.h).
template <class T>
class EncoderLayer {
 public:
  EncoderLayer(const Call& call, const Queries& queries, int l, Stream in, Stream out)
      : call_(call), queries_(queries), n_(call.net), layer_(call.net.layers[l]), l_(l), in_(in), out_(out) {}

  // The elements of panels that a thread needs for attention and for the gradients of weights.
  static long panel_elements(const Call& call, int longest, int tokens) {
    return std::max(packed_size<T>(longest, call.net.head_size()),
                    room_size<T>(std::max(call.net.units, call.net.ffn_units), tokens));
  }

  // A chunk's activations, which the backward pass reads, from stream `in`. This function is not inlined. So a
  // second call executes the same instructions and gives the same bits.
  __attribute__((noinline)) void compute_activations(const Chunk& chunk, const PackedLayer<T>& weights,
                                                     const ChunkActivations& a, Scratch& s) const {
    const int c = n_.units, f = n_.ffn_units, queries = queries_.count(chunk);
    const float* input = normalized_input(chunk, s.input);
    multiply(chunk.tokens, 2 * c, c, {input, call_.ld, 1}, weights.key_value, with_bias(weights.key_value_bias),
             a.key_value, call_.ld_kv);
    multiply(queries, c, c, {vectors_of_queries(chunk, input, s.after), call_.ld, 1}, weights.query,
             with_bias(layer_.query.bias), a.query, call_.ld);
    for (int row = chunk.first_row; row < chunk.last_row; ++row)
      for (int head = 0; head < n_.heads; ++head) attention_forward(row, head, chunk, a, s);
    multiply(queries, c, c, {a.context, call_.ld, 1}, weights.output, with_bias(layer_.output.bias), s.after,
             call_.ld);
    const float* residual = vectors_of_queries(chunk, n_.pre ? in_.values + chunk.first * call_.ld : input, s.gradient);
    add_residual(chunk, call_.dropout(l_, 1), s.after, residual, a.middle, a.middle_statistics);
    normalize_middle(chunk, a, s.gradient);
    multiply(queries, f, c, {s.gradient, call_.ld, 1}, weights.expand, with_bias(layer_.expand.bias), a.hidden,
             call_.ld_ffn);
  }

  // Stream `out`, from the activations that `compute_activations` left; s.gradient still holds the normalized middle.
  void compute_output(const Chunk& chunk, const PackedLayer<T>& weights, const ChunkActivations& a, Scratch& s) const {
    const long first = queries_.first(chunk);
    multiply(queries_.count(chunk), n_.units, n_.ffn_units, {a.hidden, call_.ld_ffn, 1}, weights.project,
             with_bias(layer_.project.bias), s.after, call_.ld, Activated{n_.activation});
    add_residual(chunk, call_.dropout(l_, 2), s.after, n_.pre ? a.middle : s.gradient.get(),
                 out_.values + first * call_.ld, out_.statistics + first);
  }

  // d_out holds the gradient of stream `out`, a vector per query. d_in gets that of stream `in`, a vector per token.
  // They are the same memory if all tokens are queries. d_out becomes invalid.
  void backward(const Chunk& chunk, const PackedLayer<T>& weights, float* d_out, float* d_in, LayerGradients& sums,
                const ChunkActivations& a, Scratch& s) const {
    float* gradient = d_out + queries_.first(chunk) * call_.ld;
    feed_forward_backward(chunk, weights, gradient, sums, a, s);
    sub_layer_input_backward(queries_.count(chunk), {a.middle, a.middle_statistics}, &n_.middle_norm(l_), gradient,
                             sums.middle_gamma, sums.middle_beta, s);
    self_attention_backward(chunk, weights, gradient, sums, a, s);
    float* d_input = d_in + chunk.first * call_.ld;
    if (!queries_.all) spread(chunk, gradient, d_input);
    const Stream in{in_.values + chunk.first * call_.ld, in_.statistics + chunk.first};
    sub_layer_input_backward(chunk.tokens, in, n_.norm_after(l_), d_input, sums.after_gamma, sums.after_beta, s);
    sums.empty = false;
  }

 private:
  static T* panels_of(const Scratch& s) { return s.panels.template as<T>(); }

  // Attention's input: stream `in` after its norm.
  const float* normalized_input(const Chunk& chunk, float* out) const {
    const Norm* norm = n_.norm_after(l_);
    const float* x = in_.values + chunk.first * call_.ld;
    if (!norm) return x;
    for (int i = 0; i < chunk.tokens; ++i)
      normalize(x + i * call_.ld, n_.units, in_.statistics[chunk.first + i], *norm, out + i * call_.ld);
    return out;
  }

  // The vectors of the queries among those of a chunk's tokens: x itself, or copies in `room`.
  const float* vectors_of_queries(const Chunk& chunk, const float* x, float* room) const {
    if (queries_.all) return x;
    queries_.each(chunk, [&](long i, int row, int position) {
      std::copy_n(x + token_in(chunk, row, position) * call_.ld, n_.units, room + i * call_.ld);
    });
    return room;
  }

  // The inverse: the queries' vectors at their tokens, and zeros at the others.
  void spread(const Chunk& chunk, const float* x, float* out) const {
    std::fill_n(out, chunk.tokens * call_.ld, 0.f);
    queries_.each(chunk, [&](long i, int row, int position) {
      std::copy_n(x + i * call_.ld, n_.units, out + token_in(chunk, row, position) * call_.ld);
    });
  }

  // The number of a token in its chunk.
  long token_in(const Chunk& chunk, int row, int position) const {
    return call_.rows[row].first - chunk.first + position;
  }

  // The number of a row's first query in its chunk.
  long query_in(const Chunk& chunk, int row) const { return queries_.rows[row].first - queries_.first(chunk); }

  // The feed-forward network's input.
  void normalize_middle(const Chunk& chunk, const ChunkActivations& a, float* out) const {
    for (int i = 0; i < queries_.count(chunk); ++i)
      normalize(a.middle + i * call_.ld, n_.units, a.middle_statistics[i], n_.middle_norm(l_), out + i * call_.ld);
  }

  // out = residual + dropout(x), and the statistics of each vector for the norm that follows.
  void add_residual(const Chunk& chunk, const Dropout& drop, float* x, const float* residual, float* out,
                    Statistics* found) const {
    queries_.each(chunk, [&](long i, int row, int position) {
      const long at = i * call_.ld;
      drop.apply(x + at, n_.units, call_.element(row, position), x + at);
      for (int j = 0; j < n_.units; ++j) out[at + j] = residual[at + j] + x[at + j];
      found[i] = statistics(out + at, n_.units, n_.epsilon);
    });
  }

  // One head of a row: its keys, values and queries, and the queries' positions in the row.
  struct Head {
    int number, row, length, queries;
    const float *key, *value, *query;
    const int* positions;
  };

  Head head_of(int number, int row, const Chunk& chunk, const ChunkActivations& a) const {
    const Row queries = queries_.rows[row];
    const long column = number * n_.head_size();
    const float* key = a.key_value + token_in(chunk, row, 0) * call_.ld_kv + column;
    const float* query = a.query + query_in(chunk, row) * call_.ld + column;
    return {number, row, call_.rows[row].length, queries.length, key, key + n_.units, query,
            queries_.positions.data() + queries.first};
  }

  // The attention weights of a head, (queries, length), without dropout. Returns their stride.
  long attention_weights(const Head& head, Scratch& s) const {
    const int d = n_.head_size(), padded = panels(head.length) * kCols;
    const long ld = stride(padded);
    const Right<T> keys = pack_transposed(head.key, call_.ld_kv, d, head.length, panels_of(s));
    multiply(head.queries, padded, d, {head.query, call_.ld, 1}, keys, kZero, s.scores, ld);
    if (n_.relative) add_relative_bias(relative_bias(head), head.positions, head.queries, s.scores, ld, s.distances);
    for (int i = 0; i < head.queries; ++i) softmax(s.scores + i * ld, head.length, attention_scale());
    return ld;
  }

  RelativeBias relative_bias(const Head& head) const {
    return {layer_.relative_bias, n_.heads, head.number, head.length, attention_scale()};
  }

  float attention_scale() const { return 1 / std::sqrt((float)n_.head_size()); }

  // out = x after dropout, attention weights of a head.
  void drop_weights(const Head& head, const float* x, long ld, float* out) const {
    const Dropout drop = call_.dropout(l_, 0);
    for (int i = 0; i < head.queries; ++i)
      drop.apply(x + i * ld, head.length, call_.weight_element(head.row, head.number, head.positions[i]), out + i * ld);
  }

  void attention_forward(int row, int number, const Chunk& chunk, const ChunkActivations& a, Scratch& s) const {
    const int d = n_.head_size();
    const Head head = head_of(number, row, chunk, a);
    const long ld = attention_weights(head, s);
    drop_weights(head, s.scores, ld, s.scores);
    const Right<T> values = right_side(head.value, call_.ld_kv, head.length, d, panels_of(s));
    multiply(head.queries, d, head.length, {s.scores, ld, 1}, values, kZero,
             a.context + query_in(chunk, row) * call_.ld + number * d, call_.ld);
  }

  // The gradients of query, key and value, into s.d_query and s.d_key_value, from those of the context, in s.after.
  void attention_backward(int row, int number, const Chunk& chunk, const ChunkActivations& a, LayerGradients& sums,
                          Scratch& s) const {
    const int d = n_.head_size(), padded = panels(call_.rows[row].length) * kCols;
    const Head head = head_of(number, row, chunk, a);
    const int t = head.length, count = head.queries;
    const long ld_kv = call_.ld_kv, ld_query = call_.ld, at_query = query_in(chunk, row) * ld_query + number * d;
    const float* gradient = s.after + at_query;
    float* d_key = s.d_key_value + token_in(chunk, row, 0) * ld_kv + number * d;
    const long ld = attention_weights(head, s);
    drop_weights(head, s.scores, ld, s.dropped);
    multiply(t, d, count, {s.dropped, 1, ld}, right_side(gradient, ld_query, count, d, panels_of(s)), kZero,
             d_key + n_.units, ld_kv);
    const Right<T> values = pack_transposed(head.value, ld_kv, d, t, panels_of(s));
    multiply(count, padded, d, {gradient, ld_query, 1}, values, kZero, s.d_scores, ld);
    drop_weights(head, s.d_scores, ld, s.d_scores);
    for (int i = 0; i < count; ++i) softmax_backward(s.scores + i * ld, t, attention_scale(), s.d_scores + i * ld);
    if (n_.relative)
      relative_bias_backward(relative_bias(head), head.positions, count, s.d_scores, ld, sums.relative_bias,
                             s.distances);
    multiply(count, d, t, {s.d_scores, ld, 1}, right_side(head.key, ld_kv, t, d, panels_of(s)), kZero,
             s.d_query + at_query, ld_query);
    multiply(t, d, count, {s.d_scores, 1, ld}, right_side(head.query, ld_query, count, d, panels_of(s)), kZero, d_key,
             ld_kv);
  }

  // The gradient of the feed-forward network's input, into s.after.
  void feed_forward_backward(const Chunk& chunk, const PackedLayer<T>& weights, const float* gradient,
                             LayerGradients& sums, const ChunkActivations& a, Scratch& s) const {
    const int c = n_.units, f = n_.ffn_units, count = queries_.count(chunk);
    const long ld = call_.ld, ld_ffn = call_.ld_ffn;
    call_.drop_rows(queries_, chunk, call_.dropout(l_, 2), gradient, s.after);
    for (int i = 0; i < count; ++i) activate(n_.activation, a.hidden + i * ld_ffn, f, s.wide + i * ld_ffn);
    add_weight_gradient(count, c, f, s.after, ld, s.wide, ld_ffn, sums.start(), sums.project, sums.project_bias,
                        panels_of(s));
    multiply(count, f, c, {s.after, ld, 1}, weights.project, kZero, s.wide, ld_ffn);
    for (int i = 0; i < count; ++i) activate_backward(n_.activation, a.hidden + i * ld_ffn, f, s.wide + i * ld_ffn);
    normalize_middle(chunk, a, s.input);
    add_weight_gradient(count, f, c, s.wide, ld_ffn, s.input, ld, sums.start(), sums.expand, sums.expand_bias,
                        panels_of(s));
    multiply(count, c, f, {s.wide, ld_ffn, 1}, weights.expand, kZero, s.after, ld);
  }

  // The gradient of self-attention's input, into s.after.
  void self_attention_backward(const Chunk& chunk, const PackedLayer<T>& weights, const float* gradient,
                               LayerGradients& sums, const ChunkActivations& a, Scratch& s) const {
    const int c = n_.units, count = queries_.count(chunk);
    const long ld = call_.ld, ld_kv = call_.ld_kv;
    call_.drop_rows(queries_, chunk, call_.dropout(l_, 1), gradient, s.gradient);
    add_weight_gradient(count, c, c, s.gradient, ld, a.context, ld, sums.start(), sums.output, sums.output_bias,
                        panels_of(s));
    multiply(count, c, c, {s.gradient, ld, 1}, weights.output, kZero, s.after, ld);
    for (int row = chunk.first_row; row < chunk.last_row; ++row)
      for (int head = 0; head < n_.heads; ++head) attention_backward(row, head, chunk, a, sums, s);
    const float* input = normalized_input(chunk, s.input);
    add_weight_gradient(count, c, c, s.d_query, ld, vectors_of_queries(chunk, input, s.gradient), ld, sums.start(),
                        sums.qkv, sums.qkv_bias, panels_of(s));
    add_weight_gradient(chunk.tokens, 2 * c, c, s.d_key_value, ld_kv, input, ld, sums.start(), sums.qkv + c * ld,
                        sums.qkv_bias + c, panels_of(s));
    multiply(chunk.tokens, c, 2 * c, {s.d_key_value, ld_kv, 1}, weights.key_value, kZero, s.after, ld);
    if (queries_.all) return multiply(count, c, c, {s.d_query, ld, 1}, weights.query, kAdd, s.after, ld);
    multiply(count, c, c, {s.d_query, ld, 1}, weights.query, kZero, s.gradient, ld);
    queries_.each(chunk, [&](long i, int row, int position) {
      add(s.gradient + i * ld, c, s.after + token_in(chunk, row, position) * ld);
    });
  }

  // From the gradient of a sub-layer's input, in s.after, through the norm to that of the values x before it. The
  // residual goes around the sub-layer alone (post) or around the norm, too (pre). `gradient` is the residual's
  // and becomes the result.
  void sub_layer_input_backward(int count, Stream x, const Norm* norm, float* gradient, float* gamma, float* beta,
                                Scratch& s) const {
    const int c = n_.units;
    for (int i = 0; i < count; ++i) {
      const long at = i * call_.ld;
      float* d_input = s.after + at;
      if (!n_.pre) add(gradient + at, c, d_input);
      if (norm) normalize_backward(x.values + at, d_input, c, x.statistics[i], *norm, d_input, gamma, beta);
      if (n_.pre) add(gradient + at, c, d_input);
      std::copy_n(d_input, c, gradient + at);
    }
  }

  // weight (outputs, inputs) = start + gradient^T * x; bias += the sum of the gradients. The rows of x and of weight
  // are ld_x apart.
  static void add_weight_gradient(int tokens, int outputs, int inputs, const float* gradient, long ld_gradient,
                                  const float* x, long ld_x, Start start, float* weight, float* bias, T* room) {
    multiply(outputs, inputs, tokens, {gradient, 1, ld_gradient}, right_side(x, ld_x, tokens, inputs, room),
             start, weight, ld_x);
    for (int i = 0; i < tokens; ++i) add(gradient + i * ld_gradient, outputs, bias);
  }

  const Call& call_;
  const Queries& queries_;
  const Network& n_;
  const Layer& layer_;
  int l_;
  Stream in_, out_;
};

}  // namespace gluon_bert
