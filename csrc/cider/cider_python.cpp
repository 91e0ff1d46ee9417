// The Python module `cider`: checks the arrays and passes them on. Errors are raised as ValueError.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <stdexcept>
#include <string>

#include "cider.h"

namespace py = pybind11;

namespace {

using Array = py::array_t<int64_t, py::array::c_style>;

void check(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument(message);
}

// Checks that `offsets` split `size` items into groups of at least `least`.
void check_offsets(const std::string& name, const Array& offsets, int64_t size, int64_t least) {
  check(offsets.ndim() == 1 && offsets.size() > 0, name + " must have one dimension, and one value at least");
  const int64_t *values = offsets.data(), *last = values + offsets.size() - 1;
  check(*values == 0 && *last == size, name + " must go from 0 to " + std::to_string(size));
  for (; values < last; ++values) {
    check(values[1] - values[0] >= least, name + " must rise by " + std::to_string(least) + " or more at place " +
                                              std::to_string(values - offsets.data()));
  }
}

attncap::Captions captions_of(const Array& tokens, const Array& offsets) {
  check(tokens.ndim() == 1, "tokens must have one dimension");
  check_offsets("offsets", offsets, tokens.size(), 0);
  return {tokens.data(), offsets.data(), offsets.size() - 1};
}

std::unique_ptr<attncap::Cider> make(const Array& tokens, const Array& offsets, const Array& images, int64_t threads) {
  const attncap::Captions references = captions_of(tokens, offsets);
  check_offsets("images", images, references.count, 1);
  check(images.size() > 1, "there must be an image");
  const py::gil_scoped_release release;
  return std::make_unique<attncap::Cider>(references, images.data(), images.size() - 1, threads);
}

py::array_t<double> score(const attncap::Cider& cider, const Array& tokens, const Array& offsets, const Array& image_of,
                          int64_t threads) {
  const attncap::Captions captions = captions_of(tokens, offsets);
  check(image_of.ndim() == 1 && image_of.size() == captions.count, "image_of must have a value for each caption");
  for (int64_t i = 0; i < image_of.size(); ++i) {
    const int64_t image = image_of.data()[i];
    check(0 <= image && image < cider.image_count(), "image " + std::to_string(image) + " of caption " +
                                                         std::to_string(i) + " is none of the " +
                                                         std::to_string(cider.image_count()) + " images");
  }
  py::array_t<double> scores(captions.count);
  double* values = scores.mutable_data();
  const py::gil_scoped_release release;
  cider.score(captions, image_of.data(), values, threads);
  return scores;
}

}  // namespace

PYBIND11_MODULE(cider, module) {
  module.doc() = "CIDEr-D of captions of token ids; attncap/metrics/cider.py is the interface to it";
  py::class_<attncap::Cider>(module, "Cider")
      .def(py::init(&make), py::arg("tokens"), py::arg("offsets"), py::arg("images"), py::arg("threads"))
      .def("score", &score, py::arg("tokens"), py::arg("offsets"), py::arg("image_of"), py::arg("threads"));
}
