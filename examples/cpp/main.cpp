// Runs a package of torchprune.export.to_aoti without Python.
//
//   run_package half.pt2 input.f32 output.f32 3 256
//
// The input is a file of float32 numbers, here 3 rows of 256; so is the output. NAME.kernels.so
// beside NAME.pt2 holds the operators of packed weights, and is loaded before it.

#include <ATen/ops/empty.h>
#include <c10/core/InferenceMode.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdlib>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <vector>

namespace fs = std::filesystem;

void load_kernels(const fs::path& library) {
  if (!fs::exists(library)) return;  // of a package without packed weights
  if (!dlopen(library.c_str(), RTLD_NOW)) throw std::runtime_error(dlerror());
}

at::Tensor read(const char* path, const std::vector<int64_t>& sizes) {
  at::Tensor tensor = at::empty(sizes);
  std::ifstream file(path, std::ios::binary);
  file.read(static_cast<char*>(tensor.data_ptr()), std::streamsize(tensor.nbytes()));
  if (!file || file.peek() != EOF) {
    throw std::runtime_error(std::string(path) + " does not hold that many float32 numbers");
  }
  return tensor;
}

void write(const char* path, const at::Tensor& tensor) {
  const at::Tensor plain = tensor.to(at::kFloat).contiguous();
  std::ofstream file(path, std::ios::binary);
  file.write(static_cast<const char*>(plain.data_ptr()), std::streamsize(plain.nbytes()));
  if (!file) throw std::runtime_error(std::string("cannot write ") + path);
}

int main(int count, char** words) try {
  if (count < 5) throw std::runtime_error("usage: run_package PACKAGE INPUT OUTPUT SIZE...");
  const fs::path package = fs::absolute(words[1]);
  load_kernels(fs::path(package).replace_extension(".kernels.so"));
  torch::inductor::AOTIModelPackageLoader model(package.string());

  std::vector<int64_t> sizes;
  for (int i = 4; i < count; ++i) sizes.push_back(std::stoll(words[i]));
  const c10::InferenceMode no_gradients;
  const std::vector<at::Tensor> outputs = model.run({read(words[2], sizes)});
  write(words[3], outputs.at(0));
  std::cout << "output " << outputs[0].sizes() << " " << outputs[0].dtype() << "\n";
  return EXIT_SUCCESS;
} catch (const c10::Error& error) {
  std::cerr << "error: " << error.what_without_backtrace() << "\n";
  return EXIT_FAILURE;
} catch (const std::exception& error) {
  std::cerr << "error: " << error.what() << "\n";
  return EXIT_FAILURE;
}
