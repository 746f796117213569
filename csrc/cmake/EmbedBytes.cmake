# Turns the compiled kernels into a C++ file that holds them.
#
#   cmake -D INPUT=<file> -D CXX=<output> -P EmbedBytes.cmake
cmake_minimum_required(VERSION 3.25)

file(READ "${INPUT}" bytes HEX)
string(LENGTH "${bytes}" length)
math(EXPR length "${length} / 2")
string(REGEX REPLACE "(..)" "0x\\1," bytes "${bytes}")
file(WRITE "${CXX}" "#include \"metal/kernel_text.h\"

namespace tq_hb {

const unsigned char kKernelLibrary[] = {${bytes}};
const std::size_t kKernelLibraryBytes = ${length};

}  // namespace tq_hb
")
