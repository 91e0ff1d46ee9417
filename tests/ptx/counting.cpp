#include "counting.h"

#include <cxxabi.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <string>

namespace ptx {

const bool is_counting = std::getenv("PTX_COUNTS") != nullptr;

namespace {

constexpr u64 kSector = 32;
constexpr u32 kBanks = 32, kBankBytes = 4;

struct Memory {
  u64 requests = 0, bytes = 0;
  u64 sectors = 0;
  std::unordered_set<u64> distinct;      // sectors
  u64 wavefronts = 0, least_wavefronts = 0;
};

struct Counts {
  std::map<std::string, Memory> memory;  // by the names of the JSON fields
  u64 barriers = 0, cluster_barriers = 0;
};
Counts counts;

void count_sectors(Memory& memory, const std::vector<u64>& addresses, u64 bytes) {
  std::unordered_set<u64> sectors;
  for (const u64 address : addresses) {
    for (u64 sector = address / kSector; sector <= (address + bytes - 1) / kSector; ++sector) sectors.insert(sector);
  }
  memory.sectors += sectors.size();
  memory.distinct.insert(sectors.begin(), sectors.end());
}

// A bank gives 4 bytes at a time; lanes that ask for the same 4 bytes share them. Accesses of 8 bytes are made for half
// of the warp at a time, those of 16 bytes for a quarter.
void count_wavefronts(Memory& memory, const std::vector<u64>& addresses, u64 bytes) {
  const size_t lanes = bytes <= 4 ? 32 : 32 * 4 / bytes;
  for (size_t first = 0; first < addresses.size(); first += lanes) {
    std::unordered_set<u64> words[kBanks];
    for (size_t i = first; i < std::min(first + lanes, addresses.size()); ++i) {
      for (u64 word = addresses[i] / kBankBytes; word <= (addresses[i] + bytes - 1) / kBankBytes; ++word) {
        words[word % kBanks].insert(word);
      }
    }
    size_t most = 0;
    for (const auto& of_bank : words) most = std::max(most, of_bank.size());
    memory.wavefronts += most;
    ++memory.least_wavefronts;
  }
}

// "void attncap::name<attncap::T, 5>(...)" without namespaces, result and parameters.
std::string short_name(const char* mangled) {
  int status = 0;
  char* const demangled = abi::__cxa_demangle(mangled, nullptr, nullptr, &status);
  std::string name = demangled ? demangled : mangled;
  std::free(demangled);
  for (const std::string& part : {std::string("(anonymous namespace)::"), std::string("attncap::")}) {
    for (size_t at; (at = name.find(part)) != std::string::npos;) name.erase(at, part.size());
  }
  int depth = 0;
  for (size_t i = 0; i < name.size(); ++i) {
    depth += (name[i] == '<') - (name[i] == '>');
    if (depth == 0 && name[i] == '(') name.erase(i);
  }
  return name.substr(name.compare(0, 5, "void ") == 0 ? 5 : 0);
}

using Fields = std::vector<std::pair<std::string, u64>>;

std::string json(const Fields& fields) {
  std::string text;
  for (const auto& [name, value] : fields) {
    text += (text.empty() ? "\"" : ", \"") + name + "\": " + std::to_string(value);
  }
  return "{" + text + "}";
}

}  // namespace

void WarpAccesses::add(u32 lane, Space space, Access access, u64 address) {
  const u64 site = u64{access.site} << 32;
  const u32 execution = executions_[site | lane]++;
  auto& request = requests_[site | execution];
  request.space = space, request.access = access;
  request.addresses.push_back(address);
}

void WarpAccesses::finish() {
  if (requests_.empty()) return;
  for (auto& [key, request] : requests_) {
    const auto& [space, access, addresses] = request;
    static const char* const names[][2] = {{"global_load", "global_store"},
                                           {"shared_load", "shared_store"},
                                           {"remote_load", "remote_store"},
                                           {"async_copy", "async_copy"}};
    Memory& memory = counts.memory[names[int(space)][access.kind]];
    ++memory.requests;
    memory.bytes += addresses.size() * access.bytes;
    if (space == Space::global || space == Space::async_copy) {
      count_sectors(memory, addresses, access.bytes);
    } else {
      count_wavefronts(memory, addresses, access.bytes);
    }
  }
  executions_.clear();
  requests_.clear();
}

void count_bulk_copy(u64 address, u64 bytes) {
  Memory& memory = counts.memory["async_copy"];
  ++memory.requests;
  memory.bytes += bytes;
  count_sectors(memory, {address}, bytes);
}

void count_barrier() { ++counts.barriers; }
void count_cluster_barrier() { ++counts.cluster_barriers; }

void begin_count(const Kernel& kernel) {
  counts = Counts();
  std::fill_n(kernel.executed, kernel.stretches, 0);
}

void end_count(const Kernel& kernel, const Launch& launch) {
  std::map<std::string, u64> instructions, expanded;
  for (u32 i = 0; i < kernel.mix_count; ++i) {
    const Mix& mix = kernel.mixes[i];
    const u64 count = mix.instructions * kernel.executed[mix.stretch];
    if (count == 0) continue;
    std::string unit = mix.unit;
    if (const size_t colon = unit.find(':'); colon != std::string::npos) {
      expanded[unit.substr(colon + 1)] += count;
      unit.resize(colon);
    }
    instructions[unit] += count;
  }
  std::string line = "{\"kernel\": \"" + short_name(kernel.name) + "\", \"entry\": \"" + kernel.name + "\"";
  const auto add = [&](const std::string& name, const std::string& value) { line += ", \"" + name + "\": " + value; };
  const auto cluster = launch.cluster ? launch.cluster : kernel.cluster_size;
  for (const auto& [name, value] : Fields{{"blocks", launch.blocks},
                                          {"threads", launch.threads},
                                          {"cluster", cluster},
                                          {"static_shared", kernel.static_shared},
                                          {"dynamic_shared", launch.dynamic_shared},
                                          {"barriers", counts.barriers},
                                          {"cluster_barriers", counts.cluster_barriers}}) {
    add(name, std::to_string(value));
  }
  for (const char* name : {"global_load", "global_store", "async_copy"}) {
    const Memory& memory = counts.memory[name];
    add(name, json({{"requests", memory.requests},
                    {"sectors", memory.sectors},
                    {"bytes", memory.bytes},
                    {"distinct", memory.distinct.size()}}));
  }
  for (const char* name : {"shared_load", "shared_store", "remote_load", "remote_store"}) {
    const Memory& memory = counts.memory[name];
    add(name, json({{"requests", memory.requests},
                    {"wavefronts", memory.wavefronts},
                    {"conflicts", memory.wavefronts - memory.least_wavefronts},
                    {"bytes", memory.bytes}}));
  }
  add("instructions", json({instructions.begin(), instructions.end()}));
  add("expanded", json({expanded.begin(), expanded.end()}));
  std::FILE* const file = std::fopen(std::getenv("PTX_COUNTS"), "a");
  if (!file) return std::perror(std::getenv("PTX_COUNTS"));
  std::fprintf(file, "%s}\n", line.c_str());
  std::fclose(file);
}

}  // namespace ptx
