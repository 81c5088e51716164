// The encoder, forward and backward, over packed rows: padding costs nothing. encoder_layer.h has a layer's math.
//
// A thread takes some rows, about kChunk tokens, through a whole layer, so that the layer's activations stay in
// its cache. The backward pass needs the activations of every layer. They are kept, or the stream between the
// layers alone is kept, and each layer is computed again from it, to the same bits.
#pragma once

#include <omp.h>

#include <cstdint>
#include <vector>

#include "buffer_pool.h"
#include "elementwise.h"
#include "encoder_layer.h"
#include "even_runs.h"
#include "gemm.h"

namespace gluon_bert {

// Where the gradients go, in the order of Network's parameters. `add`: they are added to what the arrays hold.
struct Gradients {
  bool add;
  float *token_embedding, *token_type_embedding, *position_embedding;
  float* first_norm[2];
  std::vector<std::vector<float*>> layers;  // in the order of Layer
  float* last_norm[2];
};

// What is kept for a backward pass: nothing, the stream, or the layers' activations as well.
enum class Keep { kNothing, kStream, kLayers };

// T: what products are made of, float or Bf16x2 (gemm.h).
template <class T>
class Encoder {
 public:
  // The parameters and inputs must live as long as the call they are used in.
  Encoder(const Network& network, const Inputs& inputs, Keep keep) : keep_(keep) {
    rebind(network, inputs);
    find_rows();
    if (keep == Keep::kLayers)
      for (int l = 0; l < num_layers(); ++l) activations_.emplace_back(num_tokens_, num_queries(l), call_);
    const int last = stream_number(num_layers());
    for (int i = 0; i <= last; ++i) {
      const long vectors = i == last ? num_queries(num_layers() - 1) : num_tokens_;
      stream_.emplace_back(vectors * ld());
      stream_statistics_.emplace_back(vectors);
    }
    if (network.embedding_norm) {
      embedded_ = PooledBuffer(num_tokens_ * ld());
      embedded_statistics_.resize(num_tokens_);
    }
  }

  // Sets the parameters and inputs of this call. Those of the forward pass may have moved since.
  void rebind(const Network& network, const Inputs& inputs) {
    call_.net = network, call_.in = inputs;
    call_.ld = stride(network.units), call_.ld_ffn = stride(network.ffn_units);
    call_.ld_kv = stride(2 * network.units);
  }

  // encoded (B, T, C): the vectors, and zeros on padding and where the caller reads none.
  void forward(float* encoded) {
    embed();
    PooledBuffer packed(PackedLayer<T>::size(net().units, net().ffn_units));
    std::vector<Scratch> scratch = make_scratch(false);
    for (int l = 0; l < num_layers(); ++l) {
#pragma omp parallel num_threads(threads_)
      {
        const PackedLayer<T> weights = pack(l, packed, true);
        const EncoderLayer<T> layer(call_, queries(l), l, stream(l), stream(l + 1));
#pragma omp barrier
        each_chunk([&](const Chunk& chunk) {
          Scratch& own = scratch[omp_get_thread_num()];
          const ChunkActivations activations = activations_of(l, chunk, own);
          layer.compute_activations(chunk, weights, activations, own);
          layer.compute_output(chunk, weights, activations, own);
        });
      }
    }
    const Stream last = stream(num_layers());
    const long row_size = (long)call_.in.columns * net().units;
#pragma omp parallel for num_threads(threads_) schedule(static)
    for (int row = 0; row < call_.in.rows; ++row) {
      std::fill_n(encoded + row * row_size, row_size, 0.f);
      for (long i = outputs_.rows[row].first; i < outputs_.rows[row].first + outputs_.rows[row].length; ++i)
        normalize(last.values + i * ld(), net().units, last.statistics[i], *net().norm_after(num_layers()),
                  encoded + row * row_size + (long)outputs_.positions[i] * net().units);
    }
  }

  // gradient: of encoded, (B, T, C). It is not read where the caller reads no vector.
  void backward(const float* gradient, const Gradients& out) {
    const bool recompute = keep_ == Keep::kStream;
    const size_t packed_size = PackedLayer<T>::size(net().units, net().ffn_units);
    PooledBuffer packed(packed_size), packed_forward(recompute ? packed_size : 0);
    PooledBuffer d_stream(num_tokens_ * ld()), sums((size_t)threads_ * sums_size());
    PooledBuffer d_outputs(outputs_.all ? 0 : outputs_.positions.size() * ld());
    auto d_out = [&](int l) -> float* { return queries(l).all ? d_stream : d_outputs; };
    std::vector<Scratch> scratch = make_scratch(true);
    last_norm_backward(gradient, d_out(num_layers() - 1), sums, out);
    for (int l = num_layers() - 1; l >= 0; --l) {
#pragma omp parallel num_threads(threads_)
      {
        LayerGradients own(sums + omp_get_thread_num() * sums_size(), call_);
        own.clear_vectors();
        const PackedLayer<T> weights = pack(l, packed, false);
        const PackedLayer<T> forward_weights = recompute ? pack(l, packed_forward, true) : PackedLayer<T>();
        const EncoderLayer<T> layer(call_, queries(l), l, stream(l), stream(l + 1));
#pragma omp barrier
        each_chunk([&](const Chunk& chunk) {
          Scratch& room = scratch[omp_get_thread_num()];
          const ChunkActivations activations = activations_of(l, chunk, room);
          if (recompute) layer.compute_activations(chunk, forward_weights, activations, room);
          layer.backward(chunk, weights, d_out(l), d_stream, own, activations, room);
        });
#pragma omp barrier
        scatter_gradients(sums, l, out);
      }
    }
    embed_backward(d_stream, sums, out);
  }

 private:
  // The most tokens of a chunk of several rows. A layer's activations of kChunk tokens fit a second cache if it has
  // fewer than kWide units. Those of a wider layer do not, so its chunks are larger: then the weights' gradients pass
  // through the processor less often. There is a thread for kFewest tokens on average, so that adding up its sums pays.
  static constexpr int kChunk = 128, kLargestChunk = 512, kWide = 256, kFewest = 64;
  // The places of the norms and of the distances' biases among a layer's parameters.
  static constexpr int kNorm1 = 8, kNorm2 = 14, kRelativeBias = 16;

  const Network& net() const { return call_.net; }
  int num_layers() const { return net().num_layers(); }
  long ld() const { return call_.ld; }
  size_t sums_size() const { return LayerGradients::size(call_); }

  // Stream 0 enters the first layer; stream l leaves layer l - 1.
  Stream stream(int l) {
    const int i = stream_number(l);
    return {stream_[i], stream_statistics_[i].data()};
  }

  // If nothing is kept, a layer's output replaces its input: chunk by chunk, so not where their sizes differ.
  int stream_number(int l) const {
    if (keep_ != Keep::kNothing) return l;
    return (l > 0) + (l == num_layers() && !outputs_.all);
  }

  ChunkActivations activations_of(int l, const Chunk& chunk, Scratch& s) {
    if (keep_ == Keep::kLayers) return {activations_[l], chunk.first, queries(l).first(chunk), call_};
    return {s.activations, 0, 0, call_};
  }

  const Queries& queries(int l) const { return l == num_layers() - 1 ? outputs_ : tokens_; }
  long num_queries(int l) const { return (long)queries(l).positions.size(); }

  // The gradients of the gamma and beta of the norm after stream l.
  float* const* gamma_after(const Gradients& out, int l) const {
    if (net().pre) return l < num_layers() ? &out.layers[l][kNorm1] : out.last_norm;
    return &out.layers[l - 1][kNorm2];
  }

  int length_of(int row) const {
    const float length = call_.in.valid_length[row];
    return length > 0 ? (int)std::min(length, (float)call_.in.columns) : 0;  // also of NaN
  }

  void find_rows() {
    for (int row = 0; row < call_.in.rows; ++row) {
      call_.rows.push_back({num_tokens_, length_of(row)});
      longest_ = std::max(longest_, call_.rows[row].length);
      num_tokens_ += call_.rows[row].length;
    }
    find_chunks();
    tokens_ = queries_where([](int, int) { return true; });
    tokens_.all = true;
    outputs_ = call_.in.select ? read_tokens() : tokens_;
  }

  // Divides the rows among the threads, and the rows of each thread into chunks.
  void find_chunks() {
    std::vector<int> lengths;
    for (const Row& row : call_.rows) lengths.push_back(row.length);
    const int room = std::max(longest_, net().units < kWide ? kChunk : kLargestChunk);
    const int threads = std::min(omp_get_max_threads(), (int)std::max(1L, num_tokens_ / kFewest));
    first_chunk_ = {0};
    for (Run own : even_runs(lengths, {0, call_.in.rows}, threads)) {
      for (Run rows : even_runs(lengths, own, (int)filled_runs(lengths, own, room).size())) {
        chunks_.push_back({rows.first, rows.last, call_.rows[rows.first].first, (int)tokens_of(lengths, rows)});
        largest_chunk_ = std::max(largest_chunk_, chunks_.back().tokens);
      }
      first_chunk_.push_back((int)chunks_.size());
    }
    threads_ = (int)first_chunk_.size() - 1;
  }

  // The tokens at the positions that the caller reads. Positions outside the batch are clipped to it.
  Queries read_tokens() const {
    const int rows = call_.in.rows, columns = call_.in.columns, count = call_.in.num_outputs;
    std::vector<char> read((size_t)rows * columns);
    for (int i = 0; i < count; ++i)
      read[id(call_.in.output_positions[i], rows) * columns + id(call_.in.output_positions[count + i], columns)] = true;
    return queries_where([&](int row, int position) { return read[(size_t)row * columns + position]; });
  }

  template <class Condition>
  Queries queries_where(Condition is_query) const {
    Queries found{};
    for (int row = 0; row < call_.in.rows; ++row) {
      const long first = (long)found.positions.size();
      for (int i = 0; i < call_.rows[row].length; ++i)
        if (is_query(row, i)) found.positions.push_back(i);
      found.rows.push_back({first, (int)((long)found.positions.size() - first)});
    }
    return found;
  }

  // Runs this thread's chunks. They are the same each time, so that sums over threads repeat to the bit.
  template <class Work>
  void each_chunk(Work work) const {
    // OpenMP may give fewer threads.
    for (int part = omp_get_thread_num(); part < threads_; part += omp_get_num_threads())
      for (int i = first_chunk_[part]; i < first_chunk_[part + 1]; ++i) work(chunks_[i]);
  }

  // Adds up the threads' sums from `begin` on. All threads call this together; each does a part.
  void reduce(const float* sums, long begin, long count, float* out, bool add_to_out) const {
    const long threads = omp_get_num_threads(), thread = omp_get_thread_num();
    const long first = count * thread / threads, some = count * (thread + 1) / threads - first;
    for (long t = 0; t < threads; ++t) {
      const float* x = sums + t * (long)sums_size() + begin + first;
      if (t == 0 && !add_to_out)
        std::copy_n(x, some, out + first);
      else
        add(x, (int)some, out + first);
    }
  }

  std::vector<Scratch> make_scratch(bool backward) const {
    std::vector<Scratch> all;
    const long panel_elements = EncoderLayer<T>::panel_elements(call_, longest_, largest_chunk_);
    for (int i = 0; i < threads_; ++i) {
      all.emplace_back(call_, largest_chunk_, longest_, panel_elements, backward);
      if (keep_ != Keep::kLayers) all.back().activations = Activations(largest_chunk_, largest_chunk_, call_);
    }
    return all;
  }

  PackedLayer<T> pack(int l, const PooledBuffer& room, bool forward) const {
    return PackedLayer<T>::pack(net().layers[l], net().units, net().ffn_units, room.as<T>(), forward);
  }

  void embed() {
    const Dropout drop = call_.dropout(0);
    const int c = net().units;
    const Stream first = stream(0);
#pragma omp parallel for num_threads(threads_) schedule(static)
    for (int row = 0; row < call_.in.rows; ++row)
      for (int i = 0; i < call_.rows[row].length; ++i) {
        const long token = call_.rows[row].first + i, place = (long)row * call_.in.columns + i;
        const float* word = net().token_embedding + word_at(place) * c;
        const float* type = net().token_type_embedding + token_type_at(place) * c;
        const float* position = net().position_embedding + (long)i * c;
        float* out = (net().embedding_norm ? embedded_.get() : first.values) + token * ld();
        for (int j = 0; j < c; ++j) out[j] = word[j] + type[j] + position[j];
        if (net().embedding_norm) {
          embedded_statistics_[token] = statistics(out, c, net().epsilon);
          float* normalized = first.values + token * ld();
          normalize(out, c, embedded_statistics_[token], net().first_norm, normalized);
          drop.apply(normalized, c, call_.element(row, i), normalized);
        }
        if (net().pre) first.statistics[token] = statistics(first.values + token * ld(), c, net().epsilon);
      }
  }

  // Ids outside the table are clipped to it, as MXNet's Embedding does.
  long word_at(long place) const { return id(call_.in.tokens[place], net().words); }
  long token_type_at(long place) const { return id(call_.in.token_types[place], 2); }
  static long id(float value, int count) { return value > 0 ? (long)std::min(value, (float)(count - 1)) : 0; }

  // From the gradient of `encoded` to that of the last stream.
  void last_norm_backward(const float* gradient, float* d_out, float* sums, const Gradients& out) {
    const int c = net().units;
    const Stream last = stream(num_layers());
    const Norm norm = *net().norm_after(num_layers());
#pragma omp parallel num_threads(threads_)
    {
      float* own = sums + omp_get_thread_num() * sums_size();
      std::fill_n(own, 2 * c, 0.f);
      each_chunk([&](const Chunk& chunk) {
        outputs_.each(chunk, [&](long i, int row, int position) {
          const long output = outputs_.first(chunk) + i;
          const float* d_encoded = gradient + ((long)row * call_.in.columns + position) * c;
          normalize_backward(last.values + output * ld(), d_encoded, c, last.statistics[output], norm,
                             d_out + output * ld(), own, own + c);
        });
      });
#pragma omp barrier
      reduce(sums, 0, c, gamma_after(out, num_layers())[0], out.add);
      reduce(sums, c, c, gamma_after(out, num_layers())[1], out.add);
    }
  }

  // Adds up the threads' sums of a layer's gradients into the parameters' gradients.
  void scatter_gradients(const float* sums, int l, const Gradients& out) const {
    const long c = net().units, f = net().ffn_units;
    const std::vector<float*>& g = out.layers[l];
    const LayerGradients own((float*)sums, call_);
    auto scatter = [&](const float* begin, long count, float* to) {
      reduce(sums, begin - sums, count, to, out.add);
    };
    auto scatter_rows = [&](const float* begin, long rows, long columns, long ld, float* to) {
      for (long i = 0; i < rows; ++i) scatter(begin + i * ld, columns, to + i * columns);
    };
    for (int i = 0; i < 3; ++i) {
      scatter_rows(own.qkv + i * c * ld(), c, c, ld(), g[2 * i]);
      scatter(own.qkv_bias + i * c, c, g[2 * i + 1]);
    }
    scatter_rows(own.output, c, c, ld(), g[6]);
    scatter(own.output_bias, c, g[7]);
    scatter(own.middle_gamma, c, g[net().pre ? kNorm2 : kNorm1]);
    scatter(own.middle_beta, c, g[(net().pre ? kNorm2 : kNorm1) + 1]);
    scatter_rows(own.expand, f, c, ld(), g[10]);
    scatter(own.expand_bias, f, g[11]);
    scatter_rows(own.project, c, f, call_.ld_ffn, g[12]);
    scatter(own.project_bias, c, g[13]);
    if (net().relative) scatter(own.relative_bias, kNumBuckets * net().heads, g[kRelativeBias]);
    if (net().norm_after(l)) {
      scatter(own.after_gamma, c, gamma_after(out, l)[0]);
      scatter(own.after_beta, c, gamma_after(out, l)[1]);
    }
  }

  void embed_backward(float* d_stream, float* sums, const Gradients& out) {
    const int c = net().units;
#pragma omp parallel num_threads(threads_)
    {
      if (net().embedding_norm) {
        float* own = sums + omp_get_thread_num() * sums_size();
        std::fill_n(own, 2 * c, 0.f);
        each_chunk([&](const Chunk& chunk) {
          float* gradient = d_stream + chunk.first * ld();
          call_.drop_rows(tokens_, chunk, call_.dropout(0), gradient, gradient);
          for (long token = chunk.first; token < chunk.first + chunk.tokens; ++token)
            normalize_backward(embedded_ + token * ld(), d_stream + token * ld(), c, embedded_statistics_[token],
                               net().first_norm, d_stream + token * ld(), own, own + c);
        });
#pragma omp barrier
        reduce(sums, 0, c, out.first_norm[0], out.add);
        reduce(sums, c, c, out.first_norm[1], out.add);
      }
      if (!out.add) {
        clear(out.token_embedding, (long)net().words * c);
        clear(out.position_embedding, (long)net().positions * c);
      }
#pragma omp single
      if (!out.add) std::fill_n(out.token_type_embedding, 2 * c, 0.f);
      embedding_tables_backward(d_stream, out);
    }
  }

  // All threads call this together; each clears a part.
  static void clear(float* data, long count) {
    const long threads = omp_get_num_threads(), thread = omp_get_thread_num();
    std::fill(data + count * thread / threads, data + count * (thread + 1) / threads, 0.f);
  }

  // All threads call this together. Each has columns of its own of every table, since a word may be in any row.
  void embedding_tables_backward(const float* d_stream, const Gradients& out) const {
    const int threads = omp_get_num_threads(), thread = omp_get_thread_num(), c = net().units;
    const int first = c * thread / threads, some = c * (thread + 1) / threads - first;
    for (int row = 0; row < call_.in.rows; ++row)
      for (int i = 0; i < call_.rows[row].length; ++i) {
        const float* gradient = d_stream + (call_.rows[row].first + i) * ld() + first;
        const long place = (long)row * call_.in.columns + i;
        add(gradient, some, out.token_embedding + word_at(place) * c + first);
        add(gradient, some, out.token_type_embedding + token_type_at(place) * c + first);
        add(gradient, some, out.position_embedding + (long)i * c + first);
      }
  }

  Call call_;
  Keep keep_;
  int threads_ = 1, largest_chunk_ = 1, longest_ = 1;
  long num_tokens_ = 0;
  Queries tokens_, outputs_;  // the last layer's are outputs_
  std::vector<Chunk> chunks_;
  std::vector<int> first_chunk_;  // of each thread, and their number
  std::vector<Activations> activations_;  // of each layer, if they are kept
  std::vector<PooledBuffer> stream_;      // between the layers
  std::vector<std::vector<Statistics>> stream_statistics_;
  PooledBuffer embedded_;
  std::vector<Statistics> embedded_statistics_;
};

}  // namespace gluon_bert
