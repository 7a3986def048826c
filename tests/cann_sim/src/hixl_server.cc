#include "hixl_server.h"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cstring>

#include "hixl_engine.h"
#include "hixl_pool.h"
#include "hixl_status.h"
#include "sim.h"

namespace cann_sim::hixl_sim {
namespace {

constexpr int kSliceMs = 20;  // how often a waiting thread looks whether it should stop
constexpr std::int64_t kFrameMs = 5000;
constexpr std::size_t kMaxNotifies = 4096;

bool readable(const Socket &socket) {
  pollfd item{socket.fd(), POLLIN, 0};
  return poll(&item, 1, kSliceMs) > 0;
}

}  // namespace

Server::Server(Engine *engine, const EngineName &address) : engine_(engine), socket_(listen_tcp(address)) {
  if (!socket_.open()) {
    throw Refused(26, static_cast<int>(hixl::kFailed),
                  "the listener can't bind " + address.ip + ":" + std::to_string(address.port));
  }
  thread_ = std::thread([this] { accept_loop(); });
}

Server::~Server() {
  stop_ = true;
  thread_.join();
  reap(true);
}

void Server::accept_loop() {
  while (!stop_) {
    reap(false);
    if (!readable(socket_)) continue;
    const int fd = ::accept4(socket_.fd(), nullptr, nullptr, SOCK_CLOEXEC);
    if (fd < 0) continue;
    auto session = std::make_shared<Session>();
    session->channel.control = Socket(fd);
    session->thread = std::thread([this, session] { serve(session); });
    const std::lock_guard<std::mutex> lock(mutex_);
    sessions_.push_back(session);
  }
}

void Server::reap(bool all) {
  std::vector<SessionPtr> ended;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto session = sessions_.begin(); session != sessions_.end();) {
      if (all) (*session)->stop = true;
      const bool take = all || (*session)->done;
      if (take) ended.push_back(*session);
      session = take ? sessions_.erase(session) : std::next(session);
    }
  }
  for (const SessionPtr &session : ended) session->thread.join();
}

std::size_t Server::clients() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return static_cast<std::size_t>(std::count_if(sessions_.begin(), sessions_.end(), [](const SessionPtr &session) {
    return session->channel.link.comm() != nullptr;
  }));
}

std::vector<std::pair<std::string, std::string>> Server::take_notifies() {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::vector<std::pair<std::string, std::string>> all;
  for (const SessionPtr &session : sessions_) {
    if (session->done) continue;
    all.insert(all.end(), session->inbox.begin(), session->inbox.end());
    session->inbox.clear();
  }
  return all;
}

void Server::serve(const SessionPtr &session) {
  const ScopedContext in(engine_->context());
  Channel &channel = session->channel;
  channel.heard();
  try {
    while (!stop_ && !session->stop && Channel::now_ms() - channel.heard_ms < Engine::silence_ms()) {
      if (!readable(channel.control)) continue;
      const Frame request = receive_frame(channel.control, Deadline(kFrameMs));
      channel.heard();
      Frame reply = handle(session, request);
      reply.sequence = request.sequence;
      send_frame(channel.control, reply, Deadline(kFrameMs));
      if (request.type == Message::disconnect) break;
      if (request.type == Message::connect) {
        ConnectRequest wanted;
        if (reply.status != 0 || !request.read(&wanted)) break;
        prepare(session, wanted);
      }
    }
  } catch (const Refused &refused) {
    log_event("hixl_session_ended", "\"code\":" + std::to_string(refused.code));
  }
  close_link(session);
  channel.control.close();
  session->done = true;
}

void Server::close_link(const SessionPtr &session) {
  if (session->channel.link.comm() != nullptr) log_event("hixl_server_half_closed");
  session->channel.link.close();
  const std::lock_guard<std::mutex> lock(mutex_);
  session->pool_slice = -1;
  session->inbox.clear();
}

Frame Server::handle(const SessionPtr &session, const Frame &request) {
  try {
    switch (request.type) {
      case Message::connect:
        return connect(session, request);
      case Message::disconnect:
        close_link(session);
        return {};
      case Message::ping:
        return {};
      case Message::notify:
        return notify(session, request);
      case Message::copy_in:
      case Message::copy_out:
        return copy(session, request);
      case Message::reply:
        break;
    }
  } catch (const Refused &refused) {
    return {Message::reply, static_cast<std::uint32_t>(refused.code), "", 0};
  }
  return {Message::reply, hixl::kFailed, "", 0};
}

void Server::replace_older(const SessionPtr &session, const std::string &client, const Deadline &deadline) {
  while (!deadline.passed()) {
    bool found = false;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (const SessionPtr &other : sessions_) {
        if (other == session) break;  // only those before it: two newcomers don't wait for each other
        if (other->done || other->channel.peer != client) continue;
        other->stop = true;
        found = true;
      }
    }
    if (!found) return;
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
}

int Server::free_slice() {
  if (engine_->server_pool() == 0) return -1;
  for (int slice = 0; slice < static_cast<int>(engine_->options().pool_buffers); ++slice) {
    const bool taken = std::any_of(sessions_.begin(), sessions_.end(),
                                   [slice](const SessionPtr &other) { return other->pool_slice == slice; });
    if (!taken) return slice;
  }
  return -1;
}

Frame Server::connect(const SessionPtr &session, const Frame &request) {
  ConnectRequest wanted;
  if (!request.read(&wanted) || wanted.timeout_ms <= 0) return {Message::reply, hixl::kParamInvalid, "", 0};
  wanted.client[sizeof wanted.client - 1] = '\0';
  wanted.fragment.terminate();
  if (!merge(engine_->fragment(), wanted.fragment)) return {Message::reply, hixl::kParamInvalid, "", 0};
  replace_older(session, wanted.client, Deadline(wanted.timeout_ms));
  if (clients() >= engine_->options().max_channels) return {Message::reply, hixl::kResourceExhausted, "", 0};
  ConnectReply reply;
  reply.fragment = engine_->fragment();
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    session->channel.peer = wanted.client;
    session->pool_slice = free_slice();
    if (session->pool_slice >= 0) {
      reply.pool_bytes = engine_->options().pool_mib << 20;
      reply.pool_address = engine_->server_pool() + reply.pool_bytes * static_cast<std::uint64_t>(session->pool_slice);
    }
  }
  Frame frame = Frame::of(Message::reply, reply);
  for (const Range &range : engine_->memory_ranges()) {
    frame.payload.append(reinterpret_cast<const char *>(&range), sizeof range);
  }
  return frame;
}

void Server::prepare(const SessionPtr &session, const ConnectRequest &request) {
  Fragment peer = request.fragment;
  peer.terminate();
  const auto ranks = merge(engine_->fragment(), peer);
  const Options &options = engine_->options();
  session->channel.link.open(session->channel.peer + "_" + engine_->name(), *ranks, engine_->memory_handles(),
                             request.timeout_ms, options.traffic_class, options.service_level);
  session->channel.heard();
}

Frame Server::notify(const SessionPtr &session, const Frame &request) {
  NotifyRequest got;
  if (!request.read(&got) || got.name_bytes > 1024 || got.message_bytes > 1024) {
    return {Message::reply, hixl::kParamInvalid, "", 0};
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  if (session->inbox.size() >= kMaxNotifies) return {Message::reply, hixl::kResourceExhausted, "", 0};
  session->inbox.emplace_back(std::string(got.text, got.name_bytes),
                              std::string(got.text + got.name_bytes, got.message_bytes));
  return {};
}

Frame Server::copy(const SessionPtr &session, const Frame &request) {
  CopyRequest wanted;
  const std::uint64_t slice_bytes = engine_->options().pool_mib << 20;
  if (!request.read(&wanted) || session->pool_slice < 0 || wanted.bytes > slice_bytes) {
    return {Message::reply, hixl::kParamInvalid, "", 0};
  }
  const std::uint64_t slice = engine_->server_pool() + slice_bytes * static_cast<std::uint64_t>(session->pool_slice);
  pool_copy(*engine_, slice, wanted.address, wanted.bytes, request.type == Message::copy_out);
  return {};
}

}  // namespace cann_sim::hixl_sim
