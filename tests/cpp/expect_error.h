// EXPECT_TQ_ERROR(statement, code, part...): the statement throws an Error with that code and words.
#pragma once

#include <initializer_list>
#include <string>

#include <gtest/gtest.h>

#include "core/error.h"

namespace tq_hb {

template <class Statement>
void expect_error(const Statement& statement, ErrorCode code, std::initializer_list<const char*> parts) {
  try {
    statement();
    ADD_FAILURE() << "no Error was thrown";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), code) << error.what();
    for (const char* part : parts) EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
  }
}

}  // namespace tq_hb

#define EXPECT_TQ_ERROR(statement, code, ...) ::tq_hb::expect_error([&] { statement; }, code, {__VA_ARGS__})
