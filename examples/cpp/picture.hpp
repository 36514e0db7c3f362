// A picture as a model takes it: decoded, resized as Pillow does, cropped, normalised.
#pragma once

#include <png.h>

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdio>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "bundle.hpp"

namespace hhdeploy {

// Levels of 8 bits, [1, height, width, channels].
using Picture = ov::Tensor;

inline size_t height_of(const Picture& picture) { return picture.get_shape()[1]; }
inline size_t width_of(const Picture& picture) { return picture.get_shape()[2]; }

// No object here has a destructor: libpng leaves by longjmp where a file is damaged.
inline bool decode_png(std::FILE* file, png_structp png, png_infop info) {
    if (setjmp(png_jmpbuf(png))) return false;
    png_init_io(png, file);
    png_set_user_limits(png, 20000, 20000);
    png_set_crc_action(png, PNG_CRC_ERROR_QUIT, PNG_CRC_ERROR_QUIT);  // as Pillow does, of metadata too
    png_read_png(png, info,
                 PNG_TRANSFORM_EXPAND | PNG_TRANSFORM_STRIP_ALPHA | PNG_TRANSFORM_GRAY_TO_RGB, nullptr);
    return true;
}

// Whether there are metadata that may say so: EXIF, also as ImageMagick has it in text, or XMP.
inline bool may_be_turned(png_structp png, png_infop info) {
    png_bytep exif;
    png_uint_32 bytes;
    if (png_get_eXIf_1(png, info, &bytes, &exif)) return true;
    png_textp texts;
    const int count = png_get_text(png, info, &texts, nullptr);
    return std::any_of(texts, texts + count, [](const png_text& text) {
        static const std::set<std::string> telling = {"Raw profile type exif", "XML:com.adobe.xmp", "xmp"};
        return telling.count(text.key) > 0;
    });
}

// The pixels as they are stored: red, green and blue; transparency is left out, as Pillow does.
inline Picture read_png(const std::string& path, bool turned) {
    const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rb"), std::fclose);
    if (!file) throw Error(path + " cannot be read.");
    png_structp png = png_create_read_struct(PNG_LIBPNG_VER_STRING, nullptr, nullptr, [](png_structp, auto) {});
    png_infop info = png_create_info_struct(png);
    auto destroy = [&info](png_structp p) { png_destroy_read_struct(&p, &info, nullptr); };
    const std::unique_ptr<png_struct, decltype(destroy)> owner(png, destroy);
    if (!decode_png(file.get(), png, info)) throw Error(path + " cannot be decoded as a PNG.");
    if (png_get_bit_depth(png, info) != 8)
        throw Error(path + ": expected at most 8 bits a channel. Save it with 8.");
    if (turned && may_be_turned(png, info))
        throw Error(path + ": its metadata may say that it is to be turned, which is not done here. "
                           "Save it upright, without them.");
    const size_t height = png_get_image_height(png, info), width = png_get_image_width(png, info);
    Picture picture(ov::element::u8, {1, height, width, 3});
    png_bytepp rows = png_get_rows(png, info);
    for (size_t y = 0; y < height; ++y) std::copy_n(rows[y], 3 * width, picture.data<uint8_t>() + 3 * width * y);
    return picture;
}

// Pillow's grey.
inline Picture grey(const Picture& rgb) {
    Picture result(ov::element::u8, {1, height_of(rgb), width_of(rgb), 1});
    const uint8_t* from = rgb.data<uint8_t>();
    uint8_t* to = result.data<uint8_t>();
    for (size_t i = 0; i < result.get_size(); ++i, from += 3)
        to[i] = (19595u * from[0] + 38470u * from[1] + 7471u * from[2] + 32768u) >> 16;
    return result;
}

// What Pillow weighs neighbours with: bicubic with a = -0.5, and bilinear.
inline double weight_at(const std::string& filter, double distance) {
    const double x = std::abs(distance);
    if (filter == "bilinear") return std::max(0.0, 1 - x);
    if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
    return x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0;
}

// One axis (1: height, 2: width) to another size, as Pillow resizes 8 bits: weights of 22 bits, whole levels.
inline Picture resized_along(const Picture& picture, size_t axis, size_t to, const std::string& filter) {
    constexpr int bits = 22;
    ov::Shape shape = picture.get_shape();
    const size_t from = shape[axis];
    if (from == to) return picture;
    shape[axis] = to;
    Picture result(ov::element::u8, shape);
    // Levels of one place along the axis, and how often there is all of the axis.
    const size_t inner = axis == 1 ? shape[2] * shape[3] : shape[3], outer = axis == 1 ? 1 : shape[1];
    const double scale = double(from) / to, wide = std::max(1.0, scale);
    const double support = (filter == "bilinear" ? 1 : 2) * wide;
    std::vector<double> weights;
    std::vector<int> shares, sums(inner);
    for (size_t place = 0; place < to; ++place) {
        const double center = (place + 0.5) * scale;
        const size_t first = std::max(0.0, center - support + 0.5);
        const size_t last = std::min<size_t>(from, center + support + 0.5);
        weights.clear(), shares.clear();
        for (size_t i = first; i < last; ++i) weights.push_back(weight_at(filter, (i - center + 0.5) / wide));
        const double all = std::accumulate(weights.begin(), weights.end(), 0.0);
        for (double weight : weights) shares.push_back(std::lround(weight / all * (1 << bits)));
        for (size_t o = 0; o < outer; ++o) {
            std::fill(sums.begin(), sums.end(), 1 << (bits - 1));
            const uint8_t* levels = picture.data<uint8_t>() + (o * from + first) * inner;
            for (const int share : shares) {
                for (size_t i = 0; i < inner; ++i) sums[i] += levels[i] * share;
                levels += inner;
            }
            uint8_t* out = result.data<uint8_t>() + (o * to + place) * inner;
            for (size_t i = 0; i < inner; ++i) out[i] = std::clamp(sums[i] >> bits, 0, 255);
        }
    }
    return result;
}

// Pillow resizes the width first; the height where it shrinks by more than twice as many pixels.
inline Picture resized_to(const Picture& picture, size_t height, size_t width, const std::string& filter) {
    const auto fewer_rows = std::ptrdiff_t(height_of(picture)) - std::ptrdiff_t(height);
    const auto fewer_columns = std::ptrdiff_t(width_of(picture)) - std::ptrdiff_t(width);
    if (fewer_rows > 0 && fewer_rows > 2 * fewer_columns)
        return resized_along(resized_along(picture, 1, height, filter), 2, width, filter);
    return resized_along(resized_along(picture, 2, width, filter), 1, height, filter);
}

// The transform of an adapter: `preprocess` says how, the inputs of `preprocess_graph` hold its numbers.
class Transform {
public:
    explicit Transform(const Json& entry) : preprocess_({{"interpolation", "bicubic"}, {"crop_mode", "center"}}) {
        preprocess_.update(entry.at("preprocess"));
        if (!entry.contains("preprocess_graph")) {
            const size_t channels = preprocess_.at("input_size").at(0);
            throw Error("adapter " + entry.at("name").get<std::string>() + ": " +
                        (filter() != "bicubic" && filter() != "bilinear"
                             ? "its pictures are resized by " + filter() + ": this example has bicubic and bilinear."
                         : channels != 1 && channels != 3
                             ? "it takes " + std::to_string(channels) + " channels, a picture has 1 or 3."
                             : "an earlier version wrote the bundle, without how pictures become inputs: export it again."));
        }
        const Json& inputs = entry.at("preprocess_graph").at("inputs");
        const auto numbers = [&](const char* name) { return inputs.at(name).at("value").get<std::vector<double>>(); };
        mean_ = numbers("mean"), std_ = numbers("std"), fill_ = numbers("fill");
        resize_ = numbers("resize"), crop_ = numbers("crop");
    }

    std::string filter() const { return preprocess_.at("interpolation"); }
    bool turned() const { return preprocess_.value("exif", false); }
    size_t size() const { return mean_.size() * size_t(crop_[0] * crop_[1]); }
    ov::Shape shape(size_t batch) const { return {batch, mean_.size(), size_t(crop_[0]), size_t(crop_[1])}; }

    // An upright RGB picture as float32 [channels, height, width], normalised.
    void operator()(const Picture& rgb, float* out) const {
        const Picture picture = mean_.size() == 1 ? grey(rgb) : rgb;
        const auto [height, width] = resized(height_of(picture), width_of(picture));
        if (height > most_resized / width)
            throw Error("a picture of " + std::to_string(width_of(rgb)) + " x " + std::to_string(height_of(rgb)) +
                        " pixels: its shorter edge as long as the model wants it makes " + std::to_string(width) +
                        " x " + std::to_string(height) + " of it. Cut it first.");
        const Picture small = resized_to(picture, height, width, filter());
        const int64_t top = start(height, crop_[0]), left = start(width, crop_[1]);
        const size_t channels = mean_.size();
        const uint8_t* levels = small.data<uint8_t>();
        for (size_t c = 0; c < channels; ++c)
            for (int64_t y = top; y < top + int64_t(crop_[0]); ++y)
                for (int64_t x = left; x < left + int64_t(crop_[1]); ++x) {
                    const bool inside = y >= 0 && y < height && x >= 0 && x < width;
                    const float level = inside ? levels[(y * width + x) * channels + c] : float(fill_[c]);
                    *out++ = (level / 255.0f - float(mean_[c])) / float(std_[c]);
                }
    }

private:
    static constexpr int64_t most_resized = 1 << 28;  // pixels, as in Python: a gigabyte

    // Height and width to resize to, before the crop. (std::nearbyint rounds halves to even, as Python does.)
    std::pair<int64_t, int64_t> resized(int64_t height, int64_t width) const {
        const int64_t to_height = resize_[0], to_width = resize_[1];
        const std::string mode = preprocess_.at("crop_mode");
        if (mode == "squash") return {to_height, to_width};
        if (mode == "center" && to_height == to_width) {
            const int64_t other = to_height * std::max(height, width) / std::min(height, width);
            return width <= height ? std::pair(other, to_height) : std::pair(to_height, other);
        }
        const double tall = height / resize_[0], wide = width / resize_[1];
        const double ratio = mode == "border" ? std::max(tall, wide) : std::min(tall, wide);
        const auto scaled = [&](int64_t n) { return std::max<int64_t>(1, std::nearbyint(n / ratio)); };
        return {scaled(height), scaled(width)};
    }

    // Where the crop begins in the resized picture; below 0 it begins in the margin of a smaller one.
    static int64_t start(int64_t size, double crop) {
        const int64_t lacking = std::max<int64_t>(0, int64_t(crop) - size);
        const int64_t padded = size + lacking;
        return int64_t(std::nearbyint((padded - crop) / 2.0)) - lacking / 2;
    }

    Json preprocess_;
    std::vector<double> mean_, std_, fill_, resize_, crop_;
};

// The same of an adapter's own graph in the bundle. OpenVINO computes its float64 in float32: a level of 255 is off now
// and then.
class PictureGraph {
public:
    PictureGraph(ov::Core& core, const std::string& path, const Json& inputs)
        : request_(core.compile_model(path, "CPU", ov::hint::inference_precision(ov::element::f32))
                       .create_infer_request()) {
        for (const auto& input : inputs.items()) {
            const Json& value = input.value().at("value");
            const bool whole = input.value().at("dtype") == "int64";
            ov::Tensor tensor(whole ? ov::element::i64 : ov::element::f32, {value.size()});
            for (size_t i = 0; i < value.size(); ++i)
                whole ? void(tensor.data<int64_t>()[i] = value[i]) : void(tensor.data<float>()[i] = value[i]);
            request_.set_tensor(input.key(), tensor);
        }
    }

    void operator()(const Picture& rgb, float* out) {
        const ov::Shape shape = {height_of(rgb), width_of(rgb), 3};
        request_.set_tensor("image", ov::Tensor(ov::element::u8, shape, rgb.data()));
        request_.infer();
        const ov::Tensor images = request_.get_tensor("images");
        std::copy_n(images.data<float>(), images.get_size(), out);
    }

private:
    ov::InferRequest request_;
};

}  // namespace hhdeploy
