// What XLA calls (https://docs.jax.dev/en/latest/ffi.html): polygpt/kernels/native/__init__.py registers these targets.

#include <functional>
#include <tuple>
#include <vector>

#include "attention.h"
#include "products.h"
#include "threads.h"

namespace polygpt {
namespace {

namespace ffi = xla::ffi;

// Layers in a stack; it is a single one without an axis for them.
int64_t layers_of(ffi::AnyBuffer::Dimensions sizes, size_t axes) { return sizes.size() > axes ? sizes[0] : 1; }

// The layer that XLA's slices would take: a negative index counts from the end, and one beyond the ends is moved inside.
int64_t inside(int64_t layer, int64_t layers) {
  return std::max<int64_t>(0, std::min(layer < 0 ? layer + layers : layer, layers - 1));
}

// Whether a buffer has as many numbers as will be read from it.
template <class Buffer>
bool holds(const Buffer& buffer, int64_t count) { return int64_t(buffer.element_count()) == count; }

template <class Buffer>
bool holds_or_none(const Buffer& buffer, int64_t count) { return holds(buffer, 0) || holds(buffer, count); }

ffi::Error unfit() { return ffi::Error::InvalidArgument("sizes that do not go together"); }

using Rows = ffi::Buffer<ffi::F32, 2>;
using Layer = ffi::Buffer<ffi::S32, 1>;
using Numbers = ffi::Buffer<ffi::F32>;

// The rows that a call multiplies with its matrices: those of x with numbers other than zero.
struct Factors {
  const float* x;
  int64_t inputs, rows;
  std::vector<int64_t> used;

  Factors(const float* x, int64_t inputs, int64_t rows) : x(x), inputs(inputs), rows(rows) {
    for (int64_t r = 0; r < rows; r++)
      if (std::any_of(x + r * inputs, x + (r + 1) * inputs, [](float number) { return number != 0; })) used.push_back(r);
  }

  // The rows to multiply and their places in y. Those of zeros, which free slots have, are given their zeros.
  std::vector<Row> with_places(float* y, int64_t outputs) const {
    std::vector<Row> found;
    if (int64_t(used.size()) < rows) std::fill_n(y, rows * outputs, 0.0f);
    for (int64_t r : used) found.push_back({x + r * inputs, y + r * outputs});
    return found;
  }
};

// One of the matrices of a call, in units: single outputs, or blocks of them.
struct Matrix {
  std::vector<Row> rows;
  int64_t units;
  std::function<void(const std::vector<Row>& rows, int64_t from, int64_t to)> multiply;
};

// The products of all matrices, which threads divide among them as if they were one.
ffi::Error multiply(ThreadPool& pool, const std::vector<Matrix>& matrices, int64_t multiple) {
  int64_t units = 0, parts = 0;
  for (const Matrix& matrix : matrices) units += matrix.units;
  const int64_t size = part_size(pool, units, multiple);
  for (const Matrix& matrix : matrices) parts += (matrix.units + size - 1) / size;
  const Matrix* first = matrices.data();
  in_parallel(pool, parts, [=](int64_t part) {
    const Matrix* matrix = first;
    for (int64_t own; part >= (own = (matrix->units + size - 1) / size); matrix++) part -= own;
    matrix->multiply(matrix->rows, part * size, std::min(matrix->units, (part + 1) * size));
  });
  return ffi::Error::Success();
}

// The arguments that a call has for each of its results.
template <class... Types, class Add>
ffi::Error each_matrix(const ffi::RemainingArgs& arguments, const ffi::RemainingRets& results, Add add) {
  if (arguments.size() != sizeof...(Types) * results.size()) return unfit();
  for (size_t n = 0; n < results.size(); n++) {
    size_t at = sizeof...(Types) * n;
    auto y = results.get<Rows>(n);
    std::tuple<ffi::ErrorOr<Types>...> found{arguments.get<Types>(at++)...};
    if (!y || !std::apply([](auto&... each) { return (each.has_value() && ...); }, found)) return unfit();
    if (!std::apply([&](auto&... each) { return add(*y.value(), each.value()...); }, found)) return unfit();
  }
  return ffi::Error::Success();
}

// `values` is [O, I] or a stack [L, O, I] of layers, `scale` [O] or [L, O], or [0] for none.
ffi::Error Product(ThreadPool pool, Rows x, Layer layer, ffi::RemainingArgs weights, ffi::RemainingRets results) {
  const int64_t inputs = x.dimensions()[1];
  const Factors factors(x.typed_data(), inputs, x.dimensions()[0]);
  std::vector<Matrix> matrices;
  auto add = [&](Rows y, ffi::AnyBuffer values, Numbers scale) {
    const int64_t outputs = y.dimensions()[1], layers = layers_of(values.dimensions(), 2);
    if (!holds(values, layers * outputs * inputs) || !holds_or_none(scale, layers * outputs)) return false;
    const int64_t index = inside(layer.typed_data()[0], layers);
    const float* scales = scale.element_count() ? scale.typed_data() + index * outputs : nullptr;
    auto with = [&](auto* stack) {
      const auto* own = stack + index * outputs * inputs;
      const Ahead ahead = beyond_a_tile<std::decay_t<decltype(*own)>>(inputs);
      auto run = [=](const std::vector<Row>& rows, int64_t from, int64_t to) {
        all_rows(rows.size(), [&](auto few, int64_t row) {
          some_rows<few>(rows.data() + row, own, scales, inputs, from, to, ahead);
        });
      };
      matrices.push_back({factors.with_places(y.typed_data(), outputs), outputs, run});
      return true;
    };
    switch (values.element_type()) {
      case ffi::F32: return with(values.typed_data<float>());
      case ffi::S8: return with(values.typed_data<int8_t>());
      case ffi::U16: return with(values.typed_data<uint16_t>());
      default: return false;
    }
  };
  auto error = each_matrix<ffi::AnyBuffer, Numbers>(weights, results, add);
  return error.failure() ? error : multiply(pool, matrices, OUTPUTS);
}

// See PackedInt4: [.., blocks, 8, I], [.., blocks, I], [.., blocks, I], [.., blocks, 16].
ffi::Error ProductInt4(ThreadPool pool, Rows x, Layer layer, ffi::RemainingArgs weights, ffi::RemainingRets results) {
  using Bytes = ffi::Buffer<ffi::U8>;
  const int64_t inputs = x.dimensions()[1];
  const Factors factors(x.typed_data(), inputs, x.dimensions()[0]);
  std::vector<Matrix> matrices;
  auto add = [&](Rows y, Bytes nibbles, Bytes step, Bytes zero, Numbers unit) {
    const int64_t outputs = y.dimensions()[1], blocks = (outputs + GROUP - 1) / GROUP;
    const int64_t layers = layers_of(nibbles.dimensions(), 3), all = layers * blocks;
    const int64_t start = inside(layer.typed_data()[0], layers) * blocks;
    if (!holds(nibbles, all * HALF * inputs) || !holds(step, all * inputs) || !holds(zero, all * inputs)) return false;
    if (!holds(unit, all * GROUP)) return false;
    const Int4 packed{nibbles.typed_data() + start * HALF * inputs, step.typed_data() + start * inputs,
                      zero.typed_data() + start * inputs, unit.typed_data() + start * GROUP};
    auto run = [=](const std::vector<Row>& rows, int64_t from, int64_t to) {
      for (int64_t block = from; block < to; block++)
        all_rows(rows.size(), [&](auto few, int64_t row) {
          int4_block<few>(rows.data() + row, packed, block, inputs, outputs);
        });
    };
    matrices.push_back({factors.with_places(y.typed_data(), outputs), blocks, run});
    return true;
  };
  auto error = each_matrix<Bytes, Bytes, Bytes, Numbers>(weights, results, add);
  return error.failure() ? error : multiply(pool, matrices, 1);
}

using Heads = ffi::Buffer<ffi::F32, 4>;
using Whole = ffi::Buffer<ffi::S32, 2>;

bool fits(const Cache& cache, int64_t layers, ffi::AnyBuffer k, ffi::AnyBuffer v, Whole positions, Whole last) {
  const int64_t stored = layers * cache.rows * cache.kv_heads * cache.slots * cache.dim;
  const bool own = positions.dimensions()[0] == cache.rows || positions.dimensions()[0] == 1;
  return holds(k, stored) && holds(v, stored) && k.element_type() == v.element_type() && own &&
         positions.dimensions()[1] == cache.tokens && holds(last, cache.rows) && cache.heads % cache.kv_heads == 0;
}

// q [B, T, N, H]; k, v [.., B, K, S, H] as they are stored; positions [1 or B, T], last [B, 1], reach [1]; slopes and
// sinks [N], or [0] for none.
ffi::Error Attention(ThreadPool pool, Heads q, ffi::AnyBuffer k, ffi::AnyBuffer v, Whole positions, Whole last,
                     Layer reach, Numbers slopes, Numbers sinks, Layer layer, float scale, int64_t window,
                     float softcap, ffi::Result<Heads> out) {
  if (k.dimensions().size() < 4) return unfit();
  const auto queries = q.dimensions(), stored = k.dimensions().last(4);
  const Cache cache{queries[0], queries[1], queries[2], stored[1], stored[2], queries[3]};
  const int64_t layers = layers_of(k.dimensions(), 4), index = inside(layer.typed_data()[0], layers);
  if (!fits(cache, layers, k, v, positions, last)) return unfit();
  if (!holds_or_none(slopes, cache.heads) || !holds_or_none(sinks, cache.heads)) return unfit();
  if (cache.dim > HEAD_DIM) return ffi::Error::InvalidArgument("heads of more than 256 numbers");
  const Rule rule{scale, softcap, std::min<int64_t>(window, std::numeric_limits<int32_t>::max())};
  const int64_t end = std::min<int64_t>(cache.slots, int64_t(reach.typed_data()[0]) + 1);
  const int64_t group = cache.heads / cache.kv_heads;
  const bool shared = positions.dimensions()[0] == 1;
  const int32_t *where = positions.typed_data(), *lasts = last.typed_data();
  const float *in = q.typed_data(), *slope = slopes.element_count() ? slopes.typed_data() : nullptr;
  const float* sink = sinks.element_count() ? sinks.typed_data() : nullptr;
  float* result = out->typed_data();
  auto with = [&](auto* keys, auto* values) {
    const int64_t matrix = cache.slots * cache.dim;
    const int64_t start = index * cache.rows * cache.kv_heads * matrix;
    keys += start, values += start;
    const int64_t many = cache.tokens * group, blocks = (many + QUERIES - 1) / QUERIES;
    in_parallel(pool, cache.rows * cache.kv_heads * blocks, [=](int64_t part) {
      // A row's last queries see most, and come first.
      const int64_t matrix_of = part / blocks, row = matrix_of / cache.kv_heads, kv_head = matrix_of % cache.kv_heads;
      const int64_t from = (blocks - 1 - part % blocks) * QUERIES;
      Query queries[QUERIES];
      int64_t count = 0, furthest = 0;
      for (int64_t n = from; n < std::min(many, from + QUERIES); n++) {
        const int64_t token = n / group, head = kv_head * group + n % group;
        const int64_t position = where[(shared ? 0 : row) * cache.tokens + token];
        const int64_t place = ((row * cache.tokens + token) * cache.heads + head) * cache.dim;
        if (position > lasts[row]) {  // padding, or a free slot, whose row stays zeros for the next product
          std::fill_n(result + place, cache.dim, 0.0f);
          continue;
        }
        queries[count++] = {{in + place, result + place}, position, slope ? slope[head] : 0, sink ? sink + head : nullptr};
        furthest = std::max(furthest, position);
      }
      // A slot holds no position before its own number: no query sees a slot beyond its own position.
      attend(queries, count, keys + matrix_of * matrix, values + matrix_of * matrix, rule, lasts[row],
             std::min(end, furthest + 1), cache);
    });
    return ffi::Error::Success();
  };
  switch (k.element_type()) {
    case ffi::F32: return with(k.typed_data<float>(), v.typed_data<float>());
    case ffi::U16: return with(k.typed_data<uint16_t>(), v.typed_data<uint16_t>());
    default: return ffi::Error::InvalidArgument("a cache is float32, or the bits of bfloat16");
  }
}

}  // namespace
}  // namespace polygpt

XLA_FFI_DEFINE_HANDLER_SYMBOL(polygpt_product, polygpt::Product,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<polygpt::Rows>()
                                  .Arg<polygpt::Layer>()
                                  .RemainingArgs()
                                  .RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(polygpt_product_int4, polygpt::ProductInt4,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<polygpt::Rows>()
                                  .Arg<polygpt::Layer>()
                                  .RemainingArgs()
                                  .RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(polygpt_attention, polygpt::Attention,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<polygpt::Heads>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<polygpt::Whole>()
                                  .Arg<polygpt::Whole>()
                                  .Arg<polygpt::Layer>()
                                  .Arg<polygpt::Numbers>()
                                  .Arg<polygpt::Numbers>()
                                  .Arg<polygpt::Layer>()
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("window")
                                  .Attr<float>("softcap")
                                  .Ret<polygpt::Heads>());
