// Score a picture with ONNX Runtime in C++:
//   g++ -std=c++17 -I HEADERS score.cpp -o score -L LIBRARIES -lonnxruntime
//   LD_LIBRARY_PATH=LIBRARIES ./score MODEL/model.onnx picture.ppm      # docs/reference/contract.md says where both are from
//
// MODEL is a folder that `fbclip export --bundle B --standalone MODEL` wrote, the picture a binary PPM of its size: nothing
// is resized here. Prints verdict, score and the highest value of the anomaly map. What model.json says is in the graph too.
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

struct Picture {
  int64_t width = 0, height = 0;
  std::vector<uint8_t> pixels;  // RGB
};

Picture read_ppm(const char* path) {
  std::ifstream file(path, std::ios::binary);
  std::string kind;
  Picture picture;
  int most = 0;
  if (!(file >> kind >> picture.width >> picture.height >> most) || kind != "P6" || most != 255 || picture.width < 1 ||
      picture.height < 1 || picture.width > 16384 || picture.height > 16384)
    throw std::runtime_error("no binary PPM of 8 bit");
  file.get();
  picture.pixels.resize(picture.width * picture.height * 3);
  if (!file.read(reinterpret_cast<char*>(picture.pixels.data()), picture.pixels.size()))
    throw std::runtime_error("the picture is cut off");
  return picture;
}

// Black, or of one colour: no picture of a part.
bool shows_nothing(const std::vector<uint8_t>& pixels) {
  bool uniform = true, black = true;
  for (size_t channel = 0; channel < 3; ++channel) {
    double low = 255, high = 0, sum = 0, squares = 0, count = pixels.size() / 3.0;
    for (size_t i = channel; i < pixels.size(); i += 3) {
      const double value = pixels[i];
      low = std::min(low, value), high = std::max(high, value), sum += value, squares += value * value;
    }
    const double mean = sum / count;
    uniform = uniform && high - low <= 1;
    black = black && mean < 10 && squares / count - mean * mean < 1;
  }
  return uniform || black;
}

bool is_probability(double value) { return value >= -1e-3 && value <= 1.001; }  // no number is none

int main(int count, char** arguments) try {
  if (count != 3) throw std::runtime_error("usage: score MODEL/model.onnx picture.ppm");
  Ort::Env env(ORT_LOGGING_LEVEL_ERROR);
  Ort::Session session(env, arguments[1], Ort::SessionOptions());  // on Windows the path is wide
  Ort::AllocatorWithDefaultOptions allocator;
  const Ort::ModelMetadata metadata = session.GetModelMetadata();
  const auto card = [&](const char* name) {
    const auto found = metadata.LookupCustomMetadataMapAllocated((std::string("fbclip.") + name).c_str(), allocator);
    if (!found) throw std::runtime_error("no graph of fbclip export --standalone");
    return std::string(found.get());
  };
  Picture picture = read_ppm(arguments[2]);
  if (card("input") != "uint8-nhwc" || std::stoll(card("width")) != picture.width ||
      std::stoll(card("height")) != picture.height)
    throw std::runtime_error("the model takes " + card("input") + " of " + card("width") + "x" + card("height"));
  if (card("channel_order") == "bgr")
    for (size_t i = 0; i < picture.pixels.size(); i += 3) std::swap(picture.pixels[i], picture.pixels[i + 2]);

  const std::array<int64_t, 4> shape{1, picture.height, picture.width, 3};
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  const Ort::Value image = Ort::Value::CreateTensor<uint8_t>(memory, picture.pixels.data(), picture.pixels.size(),
                                                             shape.data(), shape.size());
  const char* inputs[] = {"image"};
  const char* outputs[] = {"score", "anomaly_map"};
  const auto results = session.Run(Ort::RunOptions(), inputs, &image, 1, outputs, 2);
  const double score = results[0].GetTensorData<float>()[0];
  const float* map = results[1].GetTensorData<float>();
  const float* end = map + picture.width * picture.height;
  if (!is_probability(score) || !std::all_of(map, end, is_probability))
    throw std::runtime_error("the model gives no probability: nothing is known of the picture");
  const bool is_good = score < std::stod(card("threshold"));
  const char* verdict = shows_nothing(picture.pixels) ? "unusable" : is_good ? "good" : "defect";
  std::printf("%s %.9g %.9g\n", verdict, score, *std::max_element(map, end));
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 2;
}
