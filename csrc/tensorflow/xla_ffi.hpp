// The part of XLA's typed foreign function interface, version 0.1, that a handler needs, declared by hand: what
// TensorFlow's own headers have in xla/ffi/api/c_api.h. Structs begin with their size; fields that later versions have
// added at their ends are left out.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hvd_agn::xla {

constexpr int kMajor = 0, kMinor = 1;
constexpr int kMetadata = 1;  // of Extension::type
constexpr int kInternal = 13;

struct Error;
struct Context;

struct Extension {
  std::size_t struct_size;
  int type;
  Extension* next;
};

struct Version {
  std::size_t struct_size;
  Extension* extensions;
  int major, minor;
};

struct Metadata {
  std::size_t struct_size;
  Version version;
  std::uint32_t traits;
};

struct MetadataExtension {
  Extension base;
  Metadata* metadata;
};

struct Span {
  const char* data;
  std::size_t size;
};

struct Scalar {
  int dtype;
  void* value;
};

struct Buffer {
  std::size_t struct_size;
  Extension* extensions;
  int dtype;
  void* data;
  std::int64_t rank;
  std::int64_t* dims;
};

struct Buffers {  // arguments, results
  std::size_t struct_size;
  Extension* extensions;
  std::int64_t size;
  int* types;
  void** buffers;
};

struct Attributes {
  std::size_t struct_size;
  Extension* extensions;
  std::int64_t size;
  int* types;
  Span** names;
  void** values;
};

struct Api;

struct Frame {
  std::size_t struct_size;
  Extension* extensions;
  const Api* api;
  Context* context;
  int stage;
  Buffers arguments;
  Buffers results;
  Attributes attributes;
};

using Handler = Error*(Frame*);

struct CreateError {
  std::size_t struct_size;
  Extension* extensions;
  const char* message;
  int code;
};

struct GetMessage {
  std::size_t struct_size;
  Extension* extensions;
  Error* error;
  const char* message;
};

struct DestroyError {
  std::size_t struct_size;
  Extension* extensions;
  Error* error;
};

struct Register {
  std::size_t struct_size;
  Extension* extensions;
  Span name, platform;
  Handler *instantiate, *prepare, *initialize, *execute;
  std::uint32_t traits;
};

struct Api {
  std::size_t struct_size;
  Extension* extensions;
  Version version;
  const void* internal;
  Error* (*create_error)(CreateError*);
  void (*get_message)(GetMessage*);
  void (*destroy_error)(DestroyError*);
  Error* (*register_handler)(Register*);
};

}  // namespace hvd_agn::xla
