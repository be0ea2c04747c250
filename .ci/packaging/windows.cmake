# MinGW-w64, which compiles the kernels as a check: apt install g++-mingw-w64-x86-64-posix
set(CMAKE_SYSTEM_NAME Windows)
set(CMAKE_SYSTEM_PROCESSOR AMD64)
set(CMAKE_CXX_COMPILER x86_64-w64-mingw32-g++-posix)
# So that the programs run where the libraries of MinGW are not installed.
set(CMAKE_EXE_LINKER_FLAGS_INIT -static)
