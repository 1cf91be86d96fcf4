// Reads JSON: just enough for a bundle's manifest. A program that has a JSON library uses that one.
#pragma once

#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

struct Json {
  enum class Kind { null, boolean, number, string, array, object } kind = Kind::null;
  double number = 0;
  std::string string;
  std::vector<Json> array;
  std::vector<std::pair<std::string, Json>> object;

  const Json& operator[](const std::string& name) const {
    for (const auto& [key, value] : object)
      if (key == name) return value;
    throw std::runtime_error("no field '" + name + "'");
  }
  bool has(const std::string& name) const {
    for (const auto& [key, value] : object)
      if (key == name) return true;
    return false;
  }
  bool is_string() const { return kind == Kind::string; }
  bool is_null() const { return kind == Kind::null; }
};

class JsonReader {
 public:
  static Json parse(const std::string& text) {
    JsonReader reader(text);
    Json value = reader.value(0);
    reader.blanks();
    if (reader.at_ != text.size()) throw std::runtime_error("JSON: something follows the value");
    return value;
  }

 private:
  explicit JsonReader(const std::string& text) : text_(text) {}

  Json value(int depth) {
    if (depth > 32) throw std::runtime_error("JSON: nested too deep");
    blanks();
    Json json;
    switch (peek()) {
      case '{':
        json.kind = Json::Kind::object;
        items('{', '}', [&] {
          std::string name = quoted();
          blanks();
          expect(':');
          json.object.emplace_back(std::move(name), value(depth + 1));
        });
        break;
      case '[':
        json.kind = Json::Kind::array;
        items('[', ']', [&] { json.array.push_back(value(depth + 1)); });
        break;
      case '"':
        json.kind = Json::Kind::string;
        json.string = quoted();
        break;
      case 't': word("true"), json.kind = Json::Kind::boolean, json.number = 1; break;
      case 'f': word("false"), json.kind = Json::Kind::boolean; break;
      case 'n': word("null"); break;
      default: json.kind = Json::Kind::number, json.number = digits();
    }
    return json;
  }

  template <typename Item>
  void items(char open, char close, Item item) {
    expect(open);
    blanks();
    if (peek() == close) return expect(close);
    for (;;) {
      blanks();
      item();
      blanks();
      if (peek() == close) return expect(close);
      expect(',');
    }
  }

  std::string quoted() {
    expect('"');
    std::string result;
    while (peek() != '"') {
      char c = text_[at_++];
      if (c == '\\') {
        c = peek();
        ++at_;
        if (c == 'u') throw std::runtime_error("JSON: \\u is not read here");
        c = c == 'n' ? '\n' : c == 't' ? '\t' : c;
      }
      result += c;
    }
    expect('"');
    return result;
  }

  double digits() {
    char* end = nullptr;
    double number = std::strtod(text_.c_str() + at_, &end);
    if (end == text_.c_str() + at_) throw std::runtime_error("JSON: no value");
    at_ = end - text_.c_str();
    return number;
  }

  void word(const std::string& expected) {
    if (text_.compare(at_, expected.size(), expected)) throw std::runtime_error("JSON: no value");
    at_ += expected.size();
  }
  void blanks() {
    while (at_ < text_.size() && std::string(" \t\r\n").find(text_[at_]) != std::string::npos) ++at_;
  }
  char peek() const {
    if (at_ >= text_.size()) throw std::runtime_error("JSON: ends too early");
    return text_[at_];
  }
  void expect(char c) {
    if (peek() != c) throw std::runtime_error(std::string("JSON: expected ") + c);
    ++at_;
  }

  const std::string& text_;
  size_t at_ = 0;
};
