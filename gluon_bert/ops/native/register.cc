// Registers the operators with MXNet: their inputs, their shapes, and the classes that compute them.
//
// gluon_bert_encoder: tokens (B, T), token_types (B, T), valid_length (B,), key (2,), output positions (2, N), then the
// encoder's parameters in the order of Network -> (B, T, C). Without the attribute `select` all positions are outputs.
// gluon_bert_masked_loss: encoded (B, T, C), masked positions (2, M), masked ids (M,), then the head's six parameters ->
// the sum of the losses (1,), num_correct (1,).
// gluon_bert_adam: weight, gradient, mean, variance, of one shape, and the gradient's factor (1,) -> whether the step
// was taken (1,); it changes weight, mean and variance. gluon_bert_muon: weight, gradient and momentum of each of
// `count` matrices, and the gradients' factor (1,) -> the same (1,); it changes weights and momenta. All are float32.
//
// Gradients overwrite MXNet's arrays, whatever request type MXNet has for them. With the attribute `add` the
// parameters' gradients are added to the arrays instead.
#include <ctime>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "adam.h"
#include "encoder.h"
#include "masked_loss.h"
#include "muon.h"
#include "mxnet/lib_api.h"

using namespace mxnet::ext;
using namespace gluon_bert;

namespace {

typedef std::unordered_map<std::string, std::string> Attributes;
typedef std::vector<std::vector<unsigned int>> Shapes;

double number(const Attributes& attributes, const char* name) { return std::stod(attributes.at(name)); }
int whole(const Attributes& attributes, const char* name) { return (int)number(attributes, name); }

Activation activation_of(const Attributes& attributes) {
  const std::string& name = attributes.at("activation");
  if (name == "relu") return Activation::kRelu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  throw std::invalid_argument("no activation " + name);
}

MXReturnValue float32(const Attributes&, std::vector<int>* inputs, std::vector<int>* outputs) {
  std::fill(inputs->begin(), inputs->end(), (int)kFloat32);
  std::fill(outputs->begin(), outputs->end(), (int)kFloat32);
  return MX_SUCCESS;
}

// Returns the arrays of a call one after another.
class Arrays {
 public:
  Arrays(std::vector<MXTensor>* all, size_t first) : all_(all), at_(first) {}
  float* next() { return all_->at(at_++).data<float>(); }
  Dense dense() {
    const float* weight = next();
    return {weight, next()};
  }
  Norm norm() {
    const float* gamma = next();
    return {gamma, next()};
  }

 private:
  std::vector<MXTensor>* all_;
  size_t at_;
};

// Runs work and reports its exception to MXNet, which raises an MXNetError where a caller waits for the result.
template <class Work>
MXReturnValue catch_errors(Work work) {
  try {
    work();
    return MX_SUCCESS;
  } catch (const std::exception& error) {
    MX_ERROR_MSG << error.what();
    return MX_FAIL;
  }
}

constexpr int kEncoderInputs = 5;

int layer_parameters(const Attributes& a) { return 16 + whole(a, "relative"); }

int encoder_arrays(const Attributes& a) {
  return kEncoderInputs + 3 + 2 * whole(a, "embedding_norm") + layer_parameters(a) * whole(a, "layers") +
         2 * whole(a, "pre");
}

MXReturnValue encoder_counts(const Attributes& a, int* inputs, int* outputs) {
  *inputs = a.empty() ? 1 : encoder_arrays(a), *outputs = 1;
  return MX_SUCCESS;
}

MXReturnValue encoder_shape(const Attributes&, Shapes* inputs, Shapes* outputs) {
  const unsigned length = inputs->at(0).at(1), positions = inputs->at(kEncoderInputs + 2).at(0);
  if (length > positions) {
    MX_ERROR_MSG << "tokens must have at most " << positions << " columns (max_positions), got " << length;
    return MX_FAIL;
  }
  const std::vector<unsigned int>& output_positions = inputs->at(kEncoderInputs - 1);
  if (output_positions.size() != 2 || output_positions[0] != 2) {
    MX_ERROR_MSG << "output_positions must be of shape (2, N), rows above columns";
    return MX_FAIL;
  }
  outputs->at(0) = {inputs->at(0).at(0), length, inputs->at(kEncoderInputs).at(1)};
  return MX_SUCCESS;
}

template <class T>
class EncoderState : public CustomStatefulOp {
 public:
  explicit EncoderState(const Attributes& attributes) : a_(attributes) {}

  MXReturnValue Forward(std::vector<MXTensor>* inputs, std::vector<MXTensor>* outputs, const OpResource&) override {
    return catch_errors([&] {
      encoder_.reset(new Encoder<T>(network(inputs, 0), inputs_of(inputs, 0), keep()));
      encoder_->forward(outputs->at(0).data<float>());
      if (keep() == Keep::kNothing) encoder_.reset();
    });
  }

  MXReturnValue Backward(std::vector<MXTensor>* inputs, std::vector<MXTensor>* outputs, const OpResource&) override {
    return catch_errors([&] {
      if (!encoder_) throw std::runtime_error("the forward pass was not recorded, so there is no backward pass");
      const Network net = network(inputs, 1);
      encoder_->rebind(net, inputs_of(inputs, 1));
      for (int i = 0; i < kEncoderInputs; ++i)
        std::fill_n(outputs->at(i).data<float>(), outputs->at(i).size(), 0.f);
      Arrays out(outputs, kEncoderInputs);
      Gradients g;
      g.add = whole(a_, "add");
      g.token_embedding = out.next(), g.token_type_embedding = out.next(), g.position_embedding = out.next();
      if (net.embedding_norm)
        for (float*& norm : g.first_norm) norm = out.next();
      g.layers.resize(net.layers.size(), std::vector<float*>(layer_parameters(a_)));
      for (auto& layer : g.layers)
        for (float*& parameter : layer) parameter = out.next();
      if (net.pre)
        for (float*& norm : g.last_norm) norm = out.next();
      encoder_->backward(inputs->at(0).data<float>(), g);
    });
  }

 private:
  Keep keep() const {
    if (!whole(a_, "keep")) return Keep::kNothing;
    return whole(a_, "recompute") ? Keep::kStream : Keep::kLayers;
  }

  // The inputs are the arrays from number `first` on.
  Inputs inputs_of(std::vector<MXTensor>* arrays, size_t first) const {
    const MXTensor& tokens = arrays->at(first);
    Arrays next(arrays, first);
    Inputs in;
    in.tokens = next.next(), in.token_types = next.next(), in.valid_length = next.next();
    in.rows = (int)tokens.shape.at(0), in.columns = (int)tokens.shape.at(1);
    const float* key = next.next();  // two numbers from 0 up to 1, of 24 bits each
    in.key = (uint64_t)(key[0] * (1 << 24)) << 24 | (uint64_t)(key[1] * (1 << 24));
    in.output_positions = next.next(), in.select = whole(a_, "select");
    in.num_outputs = (int)arrays->at(first + kEncoderInputs - 1).shape.at(1);
    return in;
  }

  Network network(std::vector<MXTensor>* arrays, size_t first) const {
    Network n;
    first += kEncoderInputs;
    n.words = (int)arrays->at(first).shape.at(0), n.units = (int)arrays->at(first).shape.at(1);
    n.positions = (int)arrays->at(first + 2).shape.at(0);
    n.heads = whole(a_, "heads"), n.ffn_units = whole(a_, "ffn_units");
    n.pre = whole(a_, "pre"), n.embedding_norm = whole(a_, "embedding_norm");
    n.relative = whole(a_, "relative");
    n.activation = activation_of(a_);
    n.epsilon = (float)number(a_, "epsilon"), n.dropout = (float)number(a_, "dropout");
    Arrays next(arrays, first);
    n.token_embedding = next.next(), n.token_type_embedding = next.next(), n.position_embedding = next.next();
    if (n.embedding_norm) n.first_norm = next.norm();
    n.layers.resize(whole(a_, "layers"));
    for (Layer& layer : n.layers) {
      layer.query = next.dense(), layer.key = next.dense(), layer.value = next.dense(), layer.output = next.dense();
      layer.norm1 = next.norm();
      layer.expand = next.dense(), layer.project = next.dense();
      layer.norm2 = next.norm();
      layer.relative_bias = n.relative ? next.next() : nullptr;
    }
    if (n.pre) n.last_norm = next.norm();
    return n;
  }

  Attributes a_;
  std::unique_ptr<Encoder<T>> encoder_;
};

constexpr int kHeadInputs = 3;

MXReturnValue head_counts(const Attributes&, int* inputs, int* outputs) {
  *inputs = kHeadInputs + 6, *outputs = 2;
  return MX_SUCCESS;
}

MXReturnValue head_shape(const Attributes&, Shapes*, Shapes* outputs) {
  outputs->at(0) = {1}, outputs->at(1) = {1};
  return MX_SUCCESS;
}

template <class T>
class HeadState : public CustomStatefulOp {
 public:
  explicit HeadState(const Attributes& attributes) : a_(attributes) {}

  MXReturnValue Forward(std::vector<MXTensor>* inputs, std::vector<MXTensor>* outputs, const OpResource&) override {
    return catch_errors([&] {
      const bool keep = whole(a_, "keep");
      loss_.reset(new MaskedLoss<T>(head(inputs), masked_tokens(inputs), keep));
      loss_->forward(outputs->at(0).data<float>(), outputs->at(1).data<float>());
      if (!keep) loss_.reset();
    });
  }

  MXReturnValue Backward(std::vector<MXTensor>* inputs, std::vector<MXTensor>* outputs, const OpResource&) override {
    return catch_errors([&] {
      if (!loss_) throw std::runtime_error("the forward pass was not recorded, so there is no backward pass");
      for (int i = 1; i < kHeadInputs; ++i) std::fill_n(outputs->at(i).data<float>(), outputs->at(i).size(), 0.f);
      std::vector<MXTensor> arrays(inputs->begin() + 2, inputs->end());  // after the gradients of both outputs
      loss_->rebind(head(&arrays), masked_tokens(&arrays));
      Arrays out(outputs, kHeadInputs);
      HeadGradients g;
      g.add = whole(a_, "add");
      g.encoded = outputs->at(0).data<float>();
      g.transform = out.next(), g.transform_bias = out.next(), g.gamma = out.next(), g.beta = out.next();
      g.decoder = out.next(), g.decoder_bias = out.next();
      loss_->backward(inputs->at(0).data<float>()[0], g);
    });
  }

 private:
  MaskedTokens masked_tokens(std::vector<MXTensor>* arrays) const {
    const std::vector<int64_t>& shape = arrays->at(0).shape;
    Arrays next(arrays, 0);
    MaskedTokens p;
    p.encoded = next.next(), p.positions = next.next(), p.ids = next.next();
    p.rows = (int)shape.at(0), p.columns = (int)shape.at(1), p.count = (int)arrays->at(2).size();
    return p;
  }

  Head head(std::vector<MXTensor>* arrays) const {
    Head h;
    h.units = (int)arrays->at(0).shape.at(2), h.words = (int)arrays->at(kHeadInputs + 4).shape.at(0);
    h.activation = activation_of(a_), h.epsilon = (float)number(a_, "epsilon");
    Arrays next(arrays, kHeadInputs);
    h.transform = next.dense(), h.norm = next.norm(), h.decoder = next.dense();
    return h;
  }

  Attributes a_;
  std::unique_ptr<MaskedLoss<T>> loss_;
};

// Takes a step unless the attribute `skip` is set and the gradient's factor is not finite.
template <class Step>
MXReturnValue step_unless_skipped(const Attributes& a, std::vector<MXTensor>* inputs, std::vector<MXTensor>* outputs,
                                  Step step) {
  return catch_errors([&] {
    const float scale = *inputs->back().data<float>();
    const bool taken = std::isfinite(scale) || !whole(a, "skip");
    *outputs->at(0).data<float>() = taken;
    if (taken) step(scale);
  });
}

MXReturnValue step_shape(const Attributes&, Shapes*, Shapes* outputs) {
  outputs->at(0) = {1};
  return MX_SUCCESS;
}

MXReturnValue adam_forward(const Attributes& a, std::vector<MXTensor>* inputs, std::vector<MXTensor>* outputs,
                           const OpResource&) {
  return step_unless_skipped(a, inputs, outputs, [&](float scale) {
    auto value = [&](const char* name) { return (float)number(a, name); };
    const AdamStep step{value("rate"),  value("correction"), value("beta1"), value("beta2"), value("epsilon"),
                        value("decay"), scale};
    Arrays next(inputs, 0);
    float *weight = next.next(), *gradient = next.next(), *mean = next.next(), *variance = next.next();
    adam_step(step, (long)inputs->at(0).size(), gradient, weight, mean, variance);
  });
}

MXReturnValue adam_counts(const Attributes&, int* inputs, int* outputs) {
  *inputs = 5, *outputs = 1;
  return MX_SUCCESS;
}

MXReturnValue adam_changes(const Attributes&, std::vector<int>* inputs) {
  *inputs = {0, 2, 3};
  return MX_SUCCESS;
}

MXReturnValue muon_forward(const Attributes& a, std::vector<MXTensor>* inputs, std::vector<MXTensor>* outputs,
                           const OpResource&) {
  return step_unless_skipped(a, inputs, outputs, [&](float scale) {
    std::vector<MuonMatrix> matrices(whole(a, "count"));
    Arrays next(inputs, 0);
    for (size_t i = 0; i < matrices.size(); ++i) {
      const std::vector<int64_t>& shape = inputs->at(3 * i).shape;
      if (shape.size() != 2 || shape != inputs->at(3 * i + 1).shape || shape != inputs->at(3 * i + 2).shape)
        throw std::invalid_argument("weight, gradient and momentum must be matrices of one shape");
      MuonMatrix& m = matrices[i];
      m.rows = (int)shape.at(0), m.columns = (int)shape.at(1);
      m.weight = next.next(), m.gradient = next.next(), m.momentum = next.next();
    }
    muon_step({(float)number(a, "rate"), (float)number(a, "decay"), (float)number(a, "momentum"), scale}, matrices);
  });
}

MXReturnValue muon_counts(const Attributes& a, int* inputs, int* outputs) {
  *inputs = a.empty() ? 4 : 3 * whole(a, "count") + 1, *outputs = 1;
  return MX_SUCCESS;
}

MXReturnValue muon_changes(const Attributes& a, std::vector<int>* inputs) {
  inputs->clear();
  for (int i = 0; i < (a.empty() ? 1 : whole(a, "count")); ++i)
    for (int changed : {3 * i, 3 * i + 2}) inputs->push_back(changed);
  return MX_SUCCESS;
}

// Creates an operator, with products in bfloat16 if the attribute bf16 is set.
template <template <class> class State>
MXReturnValue create(const Attributes& attributes, const MXContext&, const Shapes&, const std::vector<int>,
                     CustomStatefulOp** state) {
  *state = whole(attributes, "bf16") ? CustomStatefulOp::create<State<Bf16x2>>(attributes)
                                     : CustomStatefulOp::create<State<float>>(attributes);
  return MX_SUCCESS;
}

}  // namespace

REGISTER_OP(gluon_bert_encoder)
    .setParseAttrs(encoder_counts)
    .setInferType(float32)
    .setInferShape(encoder_shape)
    .setCreateOpState(create<EncoderState>, "cpu");

REGISTER_OP(gluon_bert_masked_loss)
    .setParseAttrs(head_counts)
    .setInferType(float32)
    .setInferShape(head_shape)
    .setCreateOpState(create<HeadState>, "cpu");

REGISTER_OP(gluon_bert_adam)
    .setParseAttrs(adam_counts)
    .setInferType(float32)
    .setInferShape(step_shape)
    .setMutateInputs(adam_changes)
    .setForward(adam_forward, "cpu");

REGISTER_OP(gluon_bert_muon)
    .setParseAttrs(muon_counts)
    .setInferType(float32)
    .setInferShape(step_shape)
    .setMutateInputs(muon_changes)
    .setForward(muon_forward, "cpu");

MXReturnValue initialize(int version) {
  if (version >= 10700) return MX_SUCCESS;
  MX_ERROR_MSG << "MXNet " << version << " is older than this interface";
  return MX_FAIL;
}

// Multiplies matrices that stay in the caches, on all threads at once: the most that the processor can do.
// Returns the number of floating-point operations. T: what products are made of, float or Bf16x2 (gemm.h).
template <class T>
double peak_matmul_flops(int repeats) {
  constexpr int kSize = 10 * kRows, kWide = 256, kDeep = kBlockDepth;
  const int threads = omp_get_max_threads();
  const long ld = stride(kDeep);
#pragma omp parallel num_threads(threads)
  {
    std::vector<T> left(kSize * ld), right(kDeep * kWide);
    std::vector<float> out(kSize * stride(kWide));
    for (int i = 0; i < repeats; ++i)
      multiply_block(kSize, kWide, kDeep, Left<T>{left.data(), ld, 1},
                     Right<T>{right.data(), kCols, kDeep * (long)kCols}, kZero, out.data(), stride(kWide));
  }
  return 2.0 * kSize * terms<T>(kDeep) * kWide * repeats * threads;
}

// The caller measures the time.
extern "C" double gluon_bert_peak_matmul_flops(int repeats, int bf16) {
  return bf16 ? peak_matmul_flops<Bf16x2>(repeats) : peak_matmul_flops<float>(repeats);
}

// Multiplies x (rows, depth), or its transpose in memory, by a packed matrix (depth, columns) `repeats` times. The
// threads divide the rows. Returns the CPU seconds.
template <class T>
double multiply_repeatedly(int rows, int columns, int depth, bool transposed, int repeats) {
  const long ld = stride(transposed ? rows : depth), ldc = stride(columns);
  PooledBuffer x((transposed ? depth : rows) * ld), out(rows * ldc), packed(packed_size<T>(columns, depth));
  std::fill_n(x.get(), (transposed ? depth : rows) * ld, 0.5f);
  std::fill_n(packed.get(), packed_size<T>(columns, depth), 0.f);
  std::fill_n(out.get(), rows * ldc, 0.f);
  const Right<T> right{packed.template as<T>(), kCols, packed_size<T>(kCols, depth)};
  const std::clock_t before = std::clock();
#pragma omp parallel
  {
    const long threads = omp_get_num_threads(), thread = omp_get_thread_num();
    const long first = rows * thread / threads, some = rows * (thread + 1) / threads - first;
    const Left<float> left = transposed ? Left<float>{x + first, 1, ld} : Left<float>{x + first * ld, ld, 1};
    for (int i = 0; i < repeats; ++i)
      multiply((int)some, columns, depth, left, right, kZero, out + first * ldc, ldc);
  }
  return (double)(std::clock() - before) / CLOCKS_PER_SEC;
}

extern "C" double gluon_bert_multiply_repeatedly(int rows, int columns, int depth, int transposed, int bf16,
                                                 int repeats) {
  return (bf16 ? multiply_repeatedly<Bf16x2> : multiply_repeatedly<float>)(rows, columns, depth, transposed, repeats);
}

// Returns why bfloat16 is not faster than float32 here, or an empty string. It needs an instruction for it.
extern "C" const char* gluon_bert_bf16_unsupported_reason() {
#if defined(GLUON_BERT_HAS_BF16_DOT)
  return "";
#elif defined(__AVX512BF16__)
  return "clang++ does not compile products of bfloat16; set CXX to g++";
#else
  return "this processor does not have the AVX512_BF16 instructions";
#endif
}
