// Streams a file through a bundle's TorchScript graphs and edits the memory on the way. No Python.
//
//   titans_stream BUNDLE FILE [--no-edit]      prints bits per byte, as `titans run` does

#include <torch/script.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <memory>

#include "json.hpp"

namespace fs = std::filesystem;
using torch::indexing::Slice;

std::string read_file(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path.string() + ": cannot be read");
  return {std::istreambuf_iterator<char>(file), {}};
}

// One graph. Its inputs and outputs have names in the manifest, and an order in the file.
class Graph {
 public:
  Graph(const fs::path& bundle, const Json& spec) {
    if (!spec.has("formats") || !spec["formats"].has("torchscript"))
      throw std::runtime_error("the bundle has no TorchScript; export it with --format torchscript");
    module_ = torch::jit::load((bundle / spec["formats"]["torchscript"].string).string(), torch::kCPU);
    for (const Json& tensor : spec["inputs"].array) inputs_.push_back(tensor["name"].string);
    for (const Json& tensor : spec["outputs"].array) outputs_.push_back(tensor["name"].string);
  }

  std::map<std::string, torch::Tensor> operator()(const std::map<std::string, torch::Tensor>& given) {
    std::vector<torch::jit::IValue> arguments;
    for (const std::string& name : inputs_) arguments.emplace_back(given.at(name));
    auto results = module_.forward(arguments).toTuple()->elements();
    std::map<std::string, torch::Tensor> named;
    for (size_t i = 0; i < outputs_.size(); ++i) named[outputs_[i]] = results[i].toTensor();
    return named;
  }

 private:
  torch::jit::Module module_;
  std::vector<std::string> inputs_, outputs_;
};

// Memories that do not begin with one number: safetensors, a length, a JSON header, the tensors' bytes.
torch::Tensor learned(const fs::path& path, const std::string& name) {
  const std::string content = read_file(path);
  uint64_t size = 0;
  std::memcpy(&size, content.data(), sizeof size);
  const Json entry = JsonReader::parse(content.substr(8, size))[name];
  if (entry["dtype"].string != "F32") throw std::runtime_error(name + ": expected float32");
  std::vector<int64_t> shape;
  for (const Json& axis : entry["shape"].array) shape.push_back(static_cast<int64_t>(axis.number));
  auto begin = const_cast<char*>(content.data()) + 8 + size + static_cast<size_t>(entry["data_offsets"].array[0].number);
  return torch::from_blob(begin, shape, torch::kFloat32).clone().unsqueeze(0);
}

// The state before the first token, as past.<name>, one row of every entry.
std::map<std::string, torch::Tensor> initial_state(const fs::path& bundle, const Json& manifest) {
  std::map<std::string, torch::Tensor> state;
  for (const Json& entry : manifest["state"].array) {
    std::vector<int64_t> shape{1};
    for (size_t i = 1; i < entry["shape"].array.size(); ++i)
      shape.push_back(static_cast<int64_t>(entry["shape"].array[i].number));
    auto dtype = entry["dtype"].string == "int64" ? torch::kInt64 : torch::kFloat32;
    const std::string& name = entry["name"].string;
    state["past." + name] = entry["initial"].is_string() ? learned(bundle / entry["initial"].string, name)
                                                         : torch::full(shape, entry["initial"].number, dtype);
  }
  return state;
}

// The readout memory's editor: one gradient step a period, taken once the period's last target is known.
class ReadoutEditor {
 public:
  ReadoutEditor(const fs::path& bundle, const Json& manifest, const Json& editor, const torch::Tensor& memory)
      : graph_(bundle, manifest["graphs"]["gradient.readout"]),
        step_(editor["step"].number),
        adagrad_(editor.has("optimizer") && editor["optimizer"].string == "adagrad"),
        nothing_(torch::zeros_like(memory)),
        energy_(torch::zeros({memory.size(1)})) {}

  void learn(torch::Tensor& memory, std::map<std::string, torch::Tensor>& scored, const torch::Tensor& targets) {
    // The logits hold the memory's part already, so the graph is given a memory of zeros beside them.
    auto result = graph_({{"input_ids", targets},
                          {"past.readout", nothing_},
                          {"readout_key", scored["readout_key"]},
                          {"readout_rows", scored["readout_rows"]},
                          {"base_logits", scored["logits"]}});
    update(memory[0], torch::arange(result["grad.readout"].size(1)), result["grad.readout"][0]);
    // The key's one-hot parts: what each position adds to every row that it picks, summed over positions.
    auto picked = scored["readout_rows"][0];  // (tokens, contexts)
    auto [rows, place, count] = at::_unique2(picked.flatten(), true, true);
    auto parts = result["grad.readout_rows"][0].repeat_interleave(picked.size(1), 0);
    update(memory[0], rows, torch::zeros({rows.size(0), parts.size(1)}).index_add(0, place, parts));
  }

 private:
  void update(torch::Tensor memory, const torch::Tensor& rows, const torch::Tensor& gradient) {
    auto rate = torch::full({rows.size(0)}, step_);
    if (adagrad_) {
      energy_.index_add_(0, rows, gradient.square().sum(1));
      rate = step_ / torch::sqrt(1 + energy_.index_select(0, rows));
    }
    memory.index_add_(0, rows, -rate.unsqueeze(1) * gradient);
  }

  Graph graph_;
  double step_;
  bool adagrad_;
  torch::Tensor nothing_, energy_;
};

double run(const fs::path& bundle, const std::string& text, bool edit) {
  torch::InferenceMode guard;
  const Json manifest = JsonReader::parse(read_file(bundle / "titans.json"));
  const Json& recommended = manifest["recommended"];
  const bool edits = edit && !recommended["editor"].is_null();
  const int64_t total = static_cast<int64_t>(text.size()), vocab = static_cast<int64_t>(manifest["vocab_size"].number);
  const int64_t period = edits ? static_cast<int64_t>(recommended["editor"]["chunk"].number) : 512;

  Graph model(bundle, manifest["graphs"]["model"]);
  auto state = initial_state(bundle, manifest);
  std::unique_ptr<ReadoutEditor> editor;
  if (edits)
    editor = std::make_unique<ReadoutEditor>(bundle, manifest, recommended["editor"], state["past.readout"]);
  auto bytes = reinterpret_cast<const uint8_t*>(text.data());
  auto ids = torch::from_blob(const_cast<uint8_t*>(bytes), {1, total}, torch::kUInt8).to(torch::kInt64);
  state["edit"] = torch::full({1, static_cast<int64_t>(manifest["edit_layers"].number)}, edit ? recommended["edit"].number : 0.0);

  double nats = std::log(static_cast<double>(vocab));  // the first token, of which nothing is known
  for (int64_t start = 0; start < total; start += period) {
    const int64_t stop = std::min(start + period, total), known = std::min(stop + 1, total) - start - 1;
    state["input_ids"] = ids.index({Slice(), Slice(start, stop)}).contiguous();
    auto scored = model(state);  // with the memory as the period found it
    auto targets = ids.index({Slice(), Slice(start + 1, start + 1 + known)});
    auto log_p = scored["logits"].index({Slice(), Slice(0, known)}).to(torch::kFloat64).log_softmax(-1);
    nats -= log_p.gather(2, targets.unsqueeze(2)).sum().item<double>();
    for (auto& [name, tensor] : scored)
      if (name.starts_with("present.")) state["past." + name.substr(8)] = tensor;
    if (editor && stop < total) editor->learn(state["past.readout"], scored, targets.contiguous());
  }
  return nats / std::log(2.0) / static_cast<double>(total);
}

int main(int count, char** arguments) {
  const std::vector<std::string> words(arguments + 1, arguments + count);
  if (words.size() < 2 || words.size() > 3 || (words.size() == 3 && words[2] != "--no-edit")) {
    std::cerr << "titans_stream BUNDLE FILE [--no-edit]\n";
    return 2;
  }
  try {
    const std::string text = read_file(words[1]);
    if (text.empty()) throw std::runtime_error(words[1] + ": is empty; give at least one byte");
    std::cout.precision(6);
    std::cout << "bits_per_byte  " << std::fixed << run(words[0], text, words.size() == 2) << "\n";
  } catch (const std::exception& error) {
    std::cerr << "titans_stream: " << std::string(error.what()).substr(0, 400) << "\n";
    return 3;
  }
  return 0;
}
