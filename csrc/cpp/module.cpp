// The Python bindings of the CPU kernels. Tensors arrive as addresses (Tensor.data_ptr()), so that the module needs
// neither torch's headers nor its ABI; megacoder/ops/cpp.py checks dtype, contiguity and shape when it takes them.
// Functions that count or find something in a text take the text itself and hold the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>

#include "blending.h"
#include "index_check.h"
#include "kernels.h"
#include "python_statements.h"
#include "recognizer.h"
#include "text_counts.h"

namespace py = pybind11;
using megacoder::bf16;
using megacoder::Kernels;
using megacoder::grammar::Recognizer;

namespace megacoder {
const float kLeastExponent = -87.0f, kLargestExponent = 88.0f;
}

namespace {

// The tables of kernels that this processor can run, the fastest first.
std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> found;
#ifdef MEGACODER_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    if (__builtin_cpu_supports("avx512bf16")) found.push_back(&megacoder::avx512_bf16::kernels());
    found.push_back(&megacoder::avx512::kernels());
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
    found.push_back(&megacoder::avx2::kernels());
#endif
  found.push_back(&megacoder::baseline::kernels());
  return found;
}

const std::vector<const Kernels*> tables = runnable();
const Kernels* table = tables.front();
using Address = uintptr_t;

template <class T>
T* at(Address address) { return reinterpret_cast<T*>(address); }

// Calls `body` with the characters of `text` as they are stored, and their number.
template <class Body>
auto over_characters(const py::str& text, Body body) {
  PyObject* object = text.ptr();
  const int64_t size = PyUnicode_GET_LENGTH(object);
  switch (PyUnicode_KIND(object)) {
    case PyUnicode_1BYTE_KIND: return body(PyUnicode_1BYTE_DATA(object), size);
    case PyUnicode_2BYTE_KIND: return body(PyUnicode_2BYTE_DATA(object), size);
    default: return body(PyUnicode_4BYTE_DATA(object), size);
  }
}

// Calls `body` with the typed table and a null pointer of the element type.
template <class Body>
void typed(bool is_bf16, Body body) {
  if (is_bf16) body(table->bf16_, static_cast<bf16*>(nullptr));
  else body(table->fp32, static_cast<float*>(nullptr));
}

#ifdef MEGACODER_AMX
using Rows = std::array<int64_t, 4>;   // address, strides by sequence, head and token
using Shape = std::array<int64_t, 7>;  // sequences, query heads, key-value heads, queries, keys, head dim, first query

megacoder::amx::HeadRows rows(const Rows& of) { return {at<bf16>(of[0]), of[1], of[2], of[3]}; }

megacoder::amx::AttentionShape sized(const Shape& of, float scale) {
  return {of[0], of[1], of[2], of[3], of[4], of[5], of[6], scale};
}
#endif

}  // namespace

PYBIND11_MODULE(_cpp, m) {
  m.doc() = "Fused CPU kernels; addresses in, nothing out (csrc/cpp/kernels.inc). Counts over strings (text_counts.h).";
  m.attr("interface") = 3;  // raised with that of megacoder/core/native.py
  m.def("isa", [] { return table->isa; });
  m.attr("num_tables") = tables.size();
  m.def("use_table", [](size_t number) { table = tables.at(number); }, "For tests, while no kernel runs: 0 is what is chosen at import.");
  const py::call_guard<py::gil_scoped_release> nogil;
#ifdef MEGACODER_AMX
  m.def("has_amx", [] {  // not at import: it asks the system for larger signal frames
    static const bool available = megacoder::amx::available();
    return available;
  });
  m.def("weight_grad", [](Address total, Address grad, Address x, int64_t tokens, int64_t outputs, int64_t inputs) {
    megacoder::amx::weight_grad(at<float>(total), at<bf16>(grad), at<bf16>(x), tokens, outputs, inputs);
  }, nogil);
  m.def("tile_attention", [](Address out, Address lse, const Rows& q, const Rows& k, const Rows& v, Address first_keys,
                             const Shape& shape, float scale) {
    megacoder::amx::attention_forward(at<bf16>(out), at<float>(lse), rows(q), rows(k), rows(v), at<int64_t>(first_keys),
                                      sized(shape, scale));
  }, nogil);
  m.def("tile_attention_backward", [](Address grad_q, Address grad_k, Address grad_v, const Rows& grad_out, const Rows& q,
                                      const Rows& k, const Rows& v, const Rows& out, Address lse, Address first_keys,
                                      const Shape& shape, float scale) {
    megacoder::amx::attention_backward(at<bf16>(grad_q), at<bf16>(grad_k), at<bf16>(grad_v), rows(grad_out), rows(q),
                                       rows(k), rows(v), rows(out), at<float>(lse), at<int64_t>(first_keys),
                                       sized(shape, scale));
  }, nogil);
#else
  m.def("has_amx", [] { return false; });
#endif

  m.def("rms_norm_forward", [](bool b, Address x, Address residual, Address weight, Address summed, Address out,
                               Address rstd, int64_t rows, int64_t dim, float eps) {
    typed(b, [&](auto& k, auto* t) {
      using T = std::remove_pointer_t<decltype(t)>;
      k.rms_norm_forward(at<T>(x), at<T>(residual), at<T>(weight), at<T>(summed), at<T>(out), at<float>(rstd), rows,
                         dim, eps);
    });
  }, nogil);
  m.def("rms_norm_backward", [](bool b, Address grad_out, Address x, Address weight, Address rstd,
                                Address grad_residual, Address grad_x, Address grad_weight, int64_t rows, int64_t dim) {
    typed(b, [&](auto& k, auto* t) {
      using T = std::remove_pointer_t<decltype(t)>;
      k.rms_norm_backward(at<T>(grad_out), at<T>(x), at<T>(weight), at<float>(rstd), at<T>(grad_residual),
                          at<T>(grad_x), at<float>(grad_weight), rows, dim);
    });
  }, nogil);
  m.def("rope", [](bool b, Address qkv, Address cosine, Address sine, Address positions, int64_t rows,
                   int64_t row_stride, int64_t heads, int64_t head_dim, float sign) {
    typed(b, [&](auto& k, auto* t) {
      using T = std::remove_pointer_t<decltype(t)>;
      k.rope(at<T>(qkv), at<float>(cosine), at<float>(sine), at<int64_t>(positions), rows, row_stride, heads, head_dim,
             sign);
    });
  }, nogil);
  m.def("norm_rope_forward", [](bool b, Address qkv, Address query_weight, Address key_weight, Address cosine,
                                Address sine, Address positions, Address out, int64_t rows, int64_t row_stride,
                                int64_t heads, int64_t kv_heads, int64_t head_dim, float eps) {
    typed(b, [&](auto& k, auto* t) {
      using T = std::remove_pointer_t<decltype(t)>;
      k.norm_rope_forward(at<T>(qkv), at<T>(query_weight), at<T>(key_weight), at<float>(cosine), at<float>(sine),
                          at<int64_t>(positions), at<T>(out), rows, row_stride, heads, kv_heads, head_dim, eps);
    });
  }, nogil);
  m.def("norm_rope_backward", [](bool b, Address grad, Address qkv, Address query_weight, Address key_weight,
                                 Address cosine, Address sine, Address positions, Address grad_query, Address grad_key,
                                 int64_t rows, int64_t row_stride, int64_t heads, int64_t kv_heads, int64_t head_dim,
                                 float eps) {
    typed(b, [&](auto& k, auto* t) {
      using T = std::remove_pointer_t<decltype(t)>;
      k.norm_rope_backward(at<T>(grad), at<T>(qkv), at<T>(query_weight), at<T>(key_weight), at<float>(cosine),
                           at<float>(sine), at<int64_t>(positions), at<float>(grad_query), at<float>(grad_key), rows,
                           row_stride, heads, kv_heads, head_dim, eps);
    });
  }, nogil);
  m.def("swiglu_forward", [](bool b, Address gate_up, Address out, int64_t rows, int64_t dim) {
    typed(b, [&](auto& k, auto* t) {
      using T = std::remove_pointer_t<decltype(t)>;
      k.swiglu_forward(at<T>(gate_up), at<T>(out), rows, dim);
    });
  }, nogil);
  m.def("swiglu_backward", [](bool b, Address grad_out, Address gate_up, Address activation, int64_t rows,
                              int64_t dim) {
    typed(b, [&](auto& k, auto* t) {
      using T = std::remove_pointer_t<decltype(t)>;
      k.swiglu_backward(at<T>(grad_out), at<T>(gate_up), at<T>(activation), rows, dim);
    });
  }, nogil);
  m.def("cross_entropy", [](bool b, Address logits, Address labels, Address loss, int64_t rows, int64_t width,
                            int64_t vocab) {
    typed(b, [&](auto& k, auto* t) {
      using T = std::remove_pointer_t<decltype(t)>;
      k.cross_entropy(at<T>(logits), at<int64_t>(labels), at<float>(loss), rows, width, vocab);
    });
  }, nogil);
  m.def("attention_softmax", [](bool b, Address scores, Address lse, Address first_keys, int64_t rows, int64_t queries,
                                int64_t keys, int64_t visible, float scale) {
    typed(b, [&](auto& k, auto* t) {
      using T = std::remove_pointer_t<decltype(t)>;
      k.attention_softmax(at<T>(scores), at<float>(lse), at<int64_t>(first_keys), rows, queries, keys, visible, scale);
    });
  }, nogil);
  m.def("attention_softmax_backward", [](bool b, Address scores, Address grad, Address lse, Address delta,
                                         Address first_keys, int64_t rows, int64_t queries, int64_t keys,
                                         int64_t visible, float scale) {
    typed(b, [&](auto& k, auto* t) {
      using T = std::remove_pointer_t<decltype(t)>;
      k.attention_softmax_backward(at<T>(scores), at<T>(grad), at<float>(lse), at<float>(delta), at<int64_t>(first_keys),
                                   rows, queries, keys, visible, scale);
    });
  }, nogil);
  m.def("adamw", [](bool b, Address master, Address exp_avg, Address exp_avg_sq, Address grad, Address weight,
                    int64_t count, double grad_scale, double lr, double beta1, double beta2, double eps, double decay,
                    double correction1, double correction2) {
    typed(b, [&](auto& k, auto* t) {
      using T = std::remove_pointer_t<decltype(t)>;
      k.adamw(at<float>(master), at<float>(exp_avg), at<float>(exp_avg_sq), at<float>(grad), at<T>(weight), count,
              grad_scale, lr, beta1, beta2, eps, decay, correction1, correction2);
    });
  }, nogil);
  m.def("adamw_split", [](Address low, Address exp_avg, Address exp_avg_sq, Address grad, Address weight, int64_t count,
                          double grad_scale, double lr, double beta1, double beta2, double eps, double decay,
                          double correction1, double correction2) {
    table->adamw_split(at<int16_t>(low), at<float>(exp_avg), at<float>(exp_avg_sq), at<float>(grad), at<bf16>(weight),
                      count, grad_scale, lr, beta1, beta2, eps, decay, correction1, correction2);
  }, nogil);
  m.def("accumulate", [](bool b, Address total, Address addend, int64_t count) {
    typed(b, [&](auto& k, auto* t) {
      using T = std::remove_pointer_t<decltype(t)>;
      k.accumulate(at<float>(total), at<T>(addend), count);
    });
  }, nogil);
  m.def("few_rows_linear", [](bool b, Address x, Address weight, Address out, int64_t rows, int64_t dim, int64_t width) {
    typed(b, [&](auto& k, auto* t) {
      using T = std::remove_pointer_t<decltype(t)>;
      k.few_rows_linear(at<T>(x), at<T>(weight), at<T>(out), rows, dim, width);
    });
  }, nogil);
  m.def("decode_attention", [](bool b, Address x, Address residual, Address norm, Address qkv_weight,
                               Address query_norm, Address key_norm, Address out_weight, Address cosine, Address sine,
                               Address padding, Address keys, Address values, Address out, int64_t rows, int64_t dim,
                               int64_t heads, int64_t groups, int64_t head_dim, int64_t capacity, int64_t column,
                               float eps) {
    typed(b, [&](auto& k, auto* t) {
      using T = std::remove_pointer_t<decltype(t)>;
      k.decode_attention(at<T>(x), at<T>(residual), at<T>(norm), at<T>(qkv_weight), at<T>(query_norm), at<T>(key_norm),
                         at<T>(out_weight), at<float>(cosine), at<float>(sine), at<int64_t>(padding), at<T>(keys),
                         at<T>(values), at<T>(out), rows, dim, heads, groups, head_dim, capacity, column, eps);
    });
  }, nogil);
  m.def("decode_feed_forward", [](bool b, Address x, Address residual, Address norm, Address gate_up_weight,
                                  Address down_weight, Address out, int64_t rows, int64_t dim, int64_t inner_dim,
                                  float eps) {
    typed(b, [&](auto& k, auto* t) {
      using T = std::remove_pointer_t<decltype(t)>;
      k.decode_feed_forward(at<T>(x), at<T>(residual), at<T>(norm), at<T>(gate_up_weight), at<T>(down_weight), at<T>(out),
                            rows, dim, inner_dim, eps);
    });
  }, nogil);

  m.def("minhash", [](Address text, Address offsets, int64_t documents, Address addends, int64_t num_hashes,
                      int64_t ngram, Address signatures, Address num_words) {
    table->minhash(at<uint8_t>(text), at<int64_t>(offsets), documents, at<uint32_t>(addends), num_hashes, ngram,
                  at<uint32_t>(signatures), at<int64_t>(num_words));
  }, nogil);
  m.def("word_hashes", [](Address text, int64_t size, Address hashes) {
    return table->word_hashes(at<uint8_t>(text), size, at<uint64_t>(hashes));
  }, nogil);
  m.def("find_grams", [](const py::bytes& text, Address lengths, int64_t num_lengths, Address marks, int64_t shift,
                         Address hashes, int64_t num_hashes) {
    std::vector<uint64_t> found;
    table->find_grams(reinterpret_cast<const uint8_t*>(PyBytes_AS_STRING(text.ptr())), PyBytes_GET_SIZE(text.ptr()),
                     at<int64_t>(lengths), num_lengths, at<uint8_t>(marks), shift, at<uint64_t>(hashes), num_hashes,
                     found);
    py::list runs;
    for (size_t i = 0; i < found.size(); i += 3) runs.append(py::make_tuple(found[i], found[i + 1], found[i + 2]));
    return runs;
  });
  m.def("count_lines", [](const py::str& text) {
    const auto found = over_characters(text, [](auto* at, int64_t size) { return megacoder::count_lines(at, size); });
    return py::make_tuple(found.lines, found.longest, found.in_lines, found.letters);
  });
  m.def("count_words", [](const py::str& text) {
    const auto found = over_characters(text, [](auto* at, int64_t size) { return megacoder::count_words(at, size); });
    return py::make_tuple(found.words, found.numbers, found.names, found.short_names, found.lines,
                          found.distinct_lines);
  });
  m.def("surely_python", [](const py::str& text) {
    Py_ssize_t size = 0;
    const char* const encoded = PyUnicode_AsUTF8AndSize(text.ptr(), &size);
    if (!encoded) PyErr_Clear();  // a lone surrogate
    return encoded && megacoder::surely_python(encoded, size);
  });
  py::class_<Recognizer>(m, "Recognizer", "Finds texts without a syntax error in a tree-sitter grammar (recognizer.h).")
      .def(py::init([](const py::capsule& language, const std::vector<std::string>& function_words) {
        if (!PyCapsule_IsValid(language.ptr(), "tree_sitter.Language"))
          throw py::type_error("not a tree-sitter language");
        const auto* tables = static_cast<const megacoder::grammar::Tables*>(language.get_pointer());
        if (!megacoder::grammar::Grammar::knows(tables))
          throw py::value_error("grammar of ABI " + std::to_string(tables->abi_version) + ": supported are 13 to 15");
        return std::make_unique<Recognizer>(tables, function_words);
      }))
      .def("left_out", [](Recognizer& self, const py::bytes& text, double share, double function_lines,
                          bool open_end) -> int64_t {  // holds the GIL: it reads one text at a time
        if (!(share >= 0 && share <= 1))
          throw py::value_error("share = " + std::to_string(share) + ": must be from 0 to 1");
        const Py_ssize_t size = PyBytes_GET_SIZE(text.ptr());
        if (size >= int64_t{1} << 31) return -1;
        return self.left_out(reinterpret_cast<const uint8_t*>(PyBytes_AS_STRING(text.ptr())),
                             static_cast<uint32_t>(size),
                             {function_lines, static_cast<uint32_t>(share * static_cast<double>(size)), open_end});
      });
  m.def("first_wrong_sequences", [](Address lengths, Address pointers, int64_t count, int64_t itemsize) {
    return megacoder::first_wrong_sequences(at<char>(lengths), at<char>(pointers), count, itemsize);
  }, nogil);
  m.def("first_falling_offsets", [](Address offsets, int64_t count) {
    return megacoder::first_falling_offsets(at<char>(offsets), count);
  }, nogil);
  m.def("blending_indices", [](const std::vector<double>& weights, int64_t size, Address datasets, Address numbers) {
    const py::gil_scoped_release nogil;
    megacoder::blending_indices(weights.data(), static_cast<int64_t>(weights.size()), size, at<int16_t>(datasets),
                                at<int64_t>(numbers));
  });
  m.def("sum_of_squares", [](Address values, int64_t count) { return table->sum_of_squares(at<float>(values), count); },
        nogil);
}
