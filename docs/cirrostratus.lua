-- A Wireshark dissector for Cirrostratus frames, by docs/PROTOCOL.md.
--
--   wireshark -X lua_script:docs/cirrostratus.lua capture.pcap
--   tshark    -X lua_script:docs/cirrostratus.lua -r capture.pcap -Y 'cirro.message.kind == 1'
--
-- A field is named cirro.<structure>.<field>, both as PROTOCOL.md has them, with `_` for `-`. Checksums are verified where they can be:
-- payload CRCs and the tags of LONG frames always, the tags of short frames when the capture holds the handshake of their session.
-- It knows nothing of retransmissions or of what a session should do next. Tested by tests/dissector.rs.

local cirro = Proto("cirro", "Cirrostratus")

local KINDS = {
  [1] = "REQ", [2] = "WDATA", [3] = "RESP", [4] = "RDATA", [5] = "ACK_RANGES",
  [6] = "PING", [7] = "PROBE", [8] = "EVENT", [9] = "CLOSE", [10] = "PAD",
}
local OPERATIONS = {
  [1] = "READ", [2] = "WRITE", [3] = "FLUSH", [4] = "DISCARD", [5] = "WRITE_ZEROES",
  [16] = "OPEN", [17] = "RELEASE", [18] = "STAT",
}
local STATUSES = {
  [0] = "OK", [1] = "EIO", [2] = "ENOSPC", [3] = "EFENCED", [4] = "ESTALE", [5] = "ERETRY", [6] = "EINVAL",
  [7] = "EROFS", [8] = "ECORRUPT", [9] = "EBUSY", [10] = "EACCES", [11] = "ENOTSUP",
}
local REASONS = { [0] = "done", [1] = "superseded", [2] = "protocol broken", [3] = "right revoked", [4] = "restart", [5] = "full pieces do not pass" }
local PROBES = { [0] = "asks", [1] = "echo" }
local ACCESSES = { [0] = "read only", [1] = "read and write" }
local TYPES = {
  [1] = "HELLO", [2] = "HELLO_REPLY", [3] = "COOKIE", [4] = "RESET_HINT", [5] = "REDIRECT", [6] = "WHOHAS", [7] = "IHAVE",
}
local BODIES = { [1] = "hello", [2] = "hello_reply", [4] = "reset_hint", [5] = "redirect", [6] = "who_has", [7] = "i_have" }

-- Structures: {field, bytes, type, display}. Types as in PROTOCOL.md, with the base as a suffix: u32x is shown in hexadecimal.
local STRUCTURES = {
  frame_header = {
    { "vt", 1, "u8x" }, { "fflags", 1, "u8x" }, { "steer", 2, "be16x" }, { "cid", 4, "u32x" }, { "pn", 8, "u64" },
    { "ack_pn", 4, "u32" }, { "ack_bits", 8, "u64x" }, { "ack_delay", 2, "u16" }, { "credit", 4, "u32" },
  },
  message = {
    { "slot", 2, "u16" }, { "sseq", 2, "u16" }, { "frag_off", 4, "u32" }, { "plen", 2, "u16" }, { "kind", 1, "u8", KINDS },
    { "code", 1, "u8" }, { "mlen", 3, "u24" }, { "mflags", 1, "u8x" },
  },
  request_body = {
    { "offset", 8, "u64" }, { "vol_epoch", 8, "u64" }, { "vol_handle", 4, "u32x" }, { "map_version", 4, "u32" },
    { "timeout_hint_ms", 4, "u32" }, { "trace_id", 4, "u32x" },
  },
  open_request = { { "access", 1, "u8", ACCESSES }, { "oflags", 1, "u8x" }, { "", 6, "zero" }, { "take_over", 8, "u64" } },
  volume_info = {
    { "capacity_sectors", 8, "u64" }, { "vol_epoch", 8, "u64" }, { "vol_handle", 4, "u32x" }, { "block_bytes", 4, "u32" },
    { "flags", 4, "u32x" }, { "request_bytes_max", 4, "u32" }, { "serial", 20, "text" }, { "", 4, "zero" },
  },
  ack_range = { { "first", 8, "u64" }, { "last", 8, "u64" } },
  long_header = { { "vt", 1, "u8x" }, { "type", 1, "u8", TYPES }, { "steer", 2, "be16x" }, { "", 30, "zero" } },
  hello = {
    { "name_bytes", 1, "u8" }, { "volume", 64, "text" }, { "node", 16, "uuid" }, { "attachment", 16, "uuid" },
    { "session_epoch", 8, "u64" }, { "nonce", 8, "u64x" }, { "cid", 4, "u32x" }, { "steer", 2, "u16x" }, { "mtu", 2, "u16" },
    { "slots", 2, "u16" }, { "piece_bytes_max", 4, "u32" },
  },
  hello_reply = {
    { "session_epoch", 8, "u64" }, { "initiator_nonce", 8, "u64x" }, { "status", 1, "u8", STATUSES }, { "node", 16, "uuid" },
    { "incarnation", 16, "uuid" }, { "nonce", 8, "u64x" }, { "token", 8, "u64x" }, { "cid", 4, "u32x" }, { "steer", 2, "u16x" },
    { "mtu", 2, "u16" }, { "slots", 2, "u16" }, { "piece_bytes", 4, "u32" }, { "request_bytes_max", 4, "u32" },
    { "credit_sectors", 4, "u32" },
  },
  reset_hint = { { "cid", 4, "u32x" }, { "token", 8, "u64x" }, { "incarnation", 16, "uuid" } },
  redirect = { { "session_epoch", 8, "u64" }, { "initiator_nonce", 8, "u64x" }, { "steer", 2, "u16x" } },
  who_has = { { "name_bytes", 1, "u8" }, { "volume", 64, "text" }, { "nonce", 8, "u64x" }, { "steer", 2, "u16x" } },
  i_have = {
    { "name_bytes", 1, "u8" }, { "volume", 64, "text" }, { "nonce", 8, "u64x" }, { "node", 16, "uuid" },
    { "incarnation", 16, "uuid" }, { "steer", 2, "u16x" },
  },
}

local function integer_field(bits, name, title, base, names)
  if bits == "8" then return ProtoField.uint8(name, title, base, names) end
  if bits == "16" then return ProtoField.uint16(name, title, base, names) end
  if bits == "24" then return ProtoField.uint24(name, title, base, names) end
  if bits == "32" then return ProtoField.uint32(name, title, base, names) end
  return ProtoField.uint64(name, title, base, names)
end

local fields, sizes = {}, {}
for structure, rows in pairs(STRUCTURES) do
  sizes[structure] = 0
  for _, row in ipairs(rows) do
    local title, bytes, kind, names = row[1], row[2], row[3], row[4]
    local name = "cirro." .. structure .. "." .. title
    local bits, hexadecimal = kind:match("^%a+(%d+)(x?)$")
    sizes[structure] = sizes[structure] + bytes
    if bits then
      fields[name] = integer_field(bits, name, title, hexadecimal == "x" and base.HEX or base.DEC, names)
    elseif kind == "text" then
      fields[name] = ProtoField.stringz(name, title)
    elseif kind == "uuid" then
      fields[name] = ProtoField.bytes(name, title)
    end
  end
end

fields.version = ProtoField.uint8("cirro.version", "version", base.DEC, nil, 0xe0)
fields.long = ProtoField.bool("cirro.long", "LONG", 8, nil, 0x10)
fields.key_phase = ProtoField.uint8("cirro.key_phase", "key phase", base.DEC, nil, 0x0c)
fields.mode = ProtoField.uint8("cirro.mode", "mode", base.DEC, { [0] = "CRC32C", [1] = "AES-256-GCM" }, 0x03)
fields.ack_now = ProtoField.bool("cirro.ack_now", "ACK_NOW", 8, nil, 0x01)
fields.crc_trailer = ProtoField.bool("cirro.crc_trailer", "CRC_TRAILER", 8, nil, 0x02)
fields.operation = ProtoField.uint8("cirro.operation", "operation", base.DEC, OPERATIONS)
fields.status = ProtoField.uint8("cirro.status", "status", base.DEC, STATUSES)
fields.reason = ProtoField.uint8("cirro.reason", "reason", base.DEC, REASONS)
fields.probe = ProtoField.uint8("cirro.probe", "probe", base.DEC, PROBES)
fields.data = ProtoField.bytes("cirro.data", "data")
fields.control = ProtoField.bytes("cirro.control", "control payload")
fields.pad = ProtoField.bytes("cirro.pad", "padding")
fields.crc = ProtoField.uint32("cirro.crc", "CRC32C of 4 KiB", base.HEX)
fields.tag = ProtoField.uint32("cirro.tag", "tag", base.HEX)
fields.tag_state = ProtoField.string("cirro.tag_state", "tag state")
fields.mark = ProtoField.bytes("cirro.mark", "mark")
fields.sealed = ProtoField.bytes("cirro.sealed", "encrypted")
cirro.fields = fields

local experts = {
  malformed = ProtoExpert.new("cirro.malformed", "malformed frame", expert.group.MALFORMED, expert.severity.ERROR),
  checksum = ProtoExpert.new("cirro.bad_checksum", "checksum does not fit", expert.group.CHECKSUM, expert.severity.ERROR),
  refused = ProtoExpert.new("cirro.not_ok", "a request was not answered OK", expert.group.RESPONSE_CODE, expert.severity.NOTE),
}
cirro.experts = experts

cirro.prefs.ethertype = Pref.uint("EtherType", 0x88b5, "EtherType of Cirrostratus frames")
cirro.prefs.verify = Pref.bool("Verify checksums", true, "Compute CRC32C of payloads and tags")

-- CRC32C, a byte at a time. `bit` comes with Wireshark, whatever its Lua.
local CRC_TABLE = {}
for byte = 0, 255 do
  local crc = byte
  for _ = 1, 8 do
    crc = bit.bxor(bit.rshift(crc, 1), bit.band(crc, 1) == 1 and 0x82f63b78 or 0)
  end
  CRC_TABLE[byte] = crc
end

local function crc_update(crc, raw)
  for i = 1, #raw do
    crc = bit.bxor(bit.rshift(crc, 8), CRC_TABLE[bit.band(bit.bxor(crc, raw:byte(i)), 0xff)])
  end
  return crc
end

local function unsigned(crc)
  return bit.bnot(crc) % 0x100000000
end

-- Sessions seen: cid of the receiver, with the receiver's and the sender's addresses, gives the nonces in the order of the tag.
local hello_by_nonce, nonces_of = {}, {}

function cirro.init()
  hello_by_nonce, nonces_of = {}, {}
end

local function session_key(pinfo, cid)
  return tostring(pinfo.dl_src) .. tostring(pinfo.dl_dst) .. cid
end

local function reversed_key(pinfo, cid)
  return tostring(pinfo.dl_dst) .. tostring(pinfo.dl_src) .. cid
end

local function learn(pinfo, kind, body)
  if kind == 1 then
    hello_by_nonce[body:range(105, 8):raw()] = body:range(113, 4):raw()
  elseif kind == 2 then
    local initiator, target, cid = body:range(8, 8):raw(), body:range(49, 8):raw(), body:range(65, 4):raw()
    nonces_of[reversed_key(pinfo, cid)] = initiator .. target
    local initiator_cid = hello_by_nonce[initiator]
    if initiator_cid then nonces_of[session_key(pinfo, initiator_cid)] = target .. initiator end
  end
end

-- Adds the rows of a structure to the tree; `range` is exactly as long, or ends before what is encrypted.
local function add_structure(tree, range, structure, title)
  local branch = tree:add(cirro, range, title)
  local at = 0
  for _, row in ipairs(STRUCTURES[structure]) do
    local name, bytes, kind = row[1], row[2], row[3]
    if at + bytes > range:len() then return branch end
    local part = range:range(at, bytes)
    at = at + bytes
    if kind:sub(1, 1) == "u" and kind ~= "uuid" then
      branch:add_le(fields["cirro." .. structure .. "." .. name], part)
    elseif kind ~= "zero" then
      branch:add(fields["cirro." .. structure .. "." .. name], part)
    elseif part:raw():find("[^%z]") then
      branch:add_proto_expert_info(experts.malformed, "reserved bytes are not zero")
    end
  end
  return branch
end

local function add_bits(branch, vt, fflags)
  for _, name in ipairs({ "version", "long", "key_phase", "mode" }) do branch:add(fields[name], vt) end
  if fflags then
    branch:add(fields.ack_now, fflags)
    branch:add(fields.crc_trailer, fflags)
  end
end

local function check_tag(tree, range, covered)
  local item = tree:add_le(fields.tag, range)
  local state = "not checked"
  if covered and cirro.prefs.verify then
    local crc = -1
    for _, raw in ipairs(covered) do crc = crc_update(crc, raw) end
    state = unsigned(crc) == range:le_uint() and "good" or "bad"
  end
  item:add(fields.tag_state, state):set_generated()
  if state == "bad" then item:add_proto_expert_info(experts.checksum, "tag does not fit") end
end

-- A LONG frame with keys: what it says cannot be read, or stands behind fields of its own.
local function dissect_guarded(tvb, pinfo, tree)
  if tvb:len() ~= 290 then
    tree:add_proto_expert_info(experts.malformed, "a LONG frame with keys has 304 bytes")
    return
  end
  local kind = tvb(1, 1):uint()
  local name = kind ~= 5 and (TYPES[kind] or string.format("type %d", kind)) or "type 5"
  pinfo.cols.info:set(name .. ", keys")
  add_bits(add_structure(tree, tvb(0, 4), "long_header", "LONG header: " .. name .. ", keys"), tvb(0, 1))
  local structure = BODIES[kind]
  if kind == 4 or kind == 6 or kind == 7 then
    add_structure(tree, tvb(34, sizes[structure]), structure, name)
  elseif kind >= 1 and kind <= 3 then
    tree:add(fields.sealed, tvb(34, 224))
  else
    tree:add_proto_expert_info(experts.malformed, "unknown type of LONG frame")
  end
  tree:add(fields.mark, tvb(258, 16))
  tree:add(fields.mark, tvb(274, 16))
end

local function dissect_long(tvb, pinfo, tree)
  if bit.band(tvb(0, 1):uint(), 0x0f) == 1 then return dissect_guarded(tvb, pinfo, tree) end
  if tvb:len() < 190 then
    tree:add_proto_expert_info(experts.malformed, "a LONG frame has 204 bytes")
    return
  end
  local kind = tvb(1, 1):uint()
  local name = TYPES[kind] or string.format("type %d", kind)
  pinfo.cols.info:set(name)
  add_bits(add_structure(tree, tvb(0, 34), "long_header", "LONG header: " .. name), tvb(0, 1))
  local structure, body = BODIES[kind], tvb(34, 152)
  if structure then
    add_structure(tree, body:range(0, sizes[structure]), structure, name)
    learn(pinfo, kind, body)
    if kind == 1 or kind == 6 or kind == 7 then
      pinfo.cols.info:append(" " .. body:range(1, 64):stringz())
    elseif kind == 2 and body:range(16, 1):uint() ~= 0 then
      local status = STATUSES[body:range(16, 1):uint()] or "?"
      pinfo.cols.info:append(" " .. status)
      tree:add_proto_expert_info(experts.refused, "HELLO was answered " .. status)
    end
    if body:range(sizes[structure]):raw():find("[^%z]") then
      tree:add_proto_expert_info(experts.malformed, "the rest of the body is not zero")
    end
  else
    tree:add_proto_expert_info(experts.malformed, "unknown type of LONG frame")
  end
  check_tag(tree, tvb(186, 4), { string.rep("\0", 16), tvb(0, 186):raw() })
  if tvb:len() > 190 then tree:add_proto_expert_info(experts.malformed, "bytes after the tag") end
end

local function describe(kind, code, slot, frag_off, mlen)
  local text = KINDS[kind]
  if kind == 1 then
    text = string.format("%s[%d] %d", OPERATIONS[code] or "operation?", slot, mlen)
  elseif kind == 3 then
    text = string.format("%s[%d]", STATUSES[code] or "status?", slot)
  elseif kind == 2 or kind == 4 then
    text = string.format("%s[%d]+%d", text, slot, frag_off)
  elseif kind == 9 then
    text = "CLOSE " .. (REASONS[code] or "done")
  end
  return text
end

local function add_code(branch, part, kind, code)
  if kind == 1 or kind == 2 then
    branch:add(fields.operation, part)
  elseif kind == 3 or kind == 4 then
    local item = branch:add(fields.status, part)
    if code ~= 0 then item:add_proto_expert_info(experts.refused, "answered " .. (STATUSES[code] or "unknown status")) end
  elseif kind == 7 then
    branch:add(fields.probe, part)
  elseif kind == 9 then
    branch:add(fields.reason, part)
  end
end

local function add_payload(branch, range, kind, code, data)
  if data then
    branch:add(fields.data, range)
  elseif kind == 1 and code == 16 and range:len() == sizes.open_request then
    add_structure(branch, range, "open_request", "OPEN")
  elseif (kind == 3 or kind == 8) and range:len() == sizes.volume_info then
    add_structure(branch, range, "volume_info", "Volume")
  elseif kind == 5 and range:len() % sizes.ack_range == 0 then
    for at = 0, range:len() - 1, sizes.ack_range do
      add_structure(branch, range:range(at, sizes.ack_range), "ack_range", "Range")
    end
  else
    branch:add(fields.control, range)
    if kind ~= 7 and kind ~= 10 then
      branch:add_proto_expert_info(experts.malformed, "a payload of this size does not belong to this message")
    end
  end
end

-- One message at `at`: where the next one starts, and its payload if that is data; or nil and what is wrong.
local function dissect_message(tvb, pinfo, tree, at)
  if tvb:len() - at < 16 then return nil, "a message reaches past the end" end
  local kind, code, plen = tvb(at + 10, 1):uint(), tvb(at + 11, 1):uint(), tvb(at + 8, 2):le_uint()
  local headers = kind == 1 and 48 or 16
  local padding = (8 - plen % 8) % 8
  local next_at = at + headers + plen + padding
  if not KINDS[kind] then return nil, "unknown kind" end
  if next_at > tvb:len() then return nil, "a message reaches past the end" end
  local slot, frag_off, mlen = tvb(at, 2):le_uint(), tvb(at + 4, 4):le_uint(), tvb(at + 12, 3):le_uint()
  local text = describe(kind, code, slot, frag_off, mlen)
  local branch = add_structure(tree, tvb(at, 16), "message", "Message: " .. text)
  branch:set_len(next_at - at)
  add_code(branch, tvb(at + 11, 1), kind, code)
  pinfo.cols.info:append((at == 34 and "" or ", ") .. text)
  if headers == 48 then add_structure(branch, tvb(at + 16, 32), "request_body", "Request") end
  local data = kind == 2 or kind == 4 or (kind == 1 and code == 2)
  local payload = plen > 0 and tvb(at + headers, plen) or nil
  if payload then add_payload(branch, payload, kind, code, data) end
  if padding > 0 then
    local pad = tvb(next_at - padding, padding)
    branch:add(fields.pad, pad)
    if pad:raw():find("[^%z]") then branch:add_proto_expert_info(experts.malformed, "padding is not zero") end
  end
  return next_at, data and payload or nil
end

local function dissect_trailer(tvb, pinfo, tree, at, payloads)
  local covered, start = {}, 0
  for _, payload in ipairs(payloads) do
    covered[#covered + 1] = tvb(start, payload.offset - start):raw()
    start = payload.offset + payload.range:len()
    for block = 0, payload.range:len() - 1, 4096 do
      local item = tree:add_le(fields.crc, tvb(at, 4))
      local part = payload.range:range(block, math.min(4096, payload.range:len() - block))
      if cirro.prefs.verify and unsigned(crc_update(-1, part:raw())) ~= tvb(at, 4):le_uint() then
        item:add_proto_expert_info(experts.checksum, "CRC of a payload does not fit")
      end
      at = at + 4
    end
  end
  covered[#covered + 1] = tvb(start, at - start):raw()
  local nonces = nonces_of[session_key(pinfo, tvb(4, 4):raw())]
  if nonces then table.insert(covered, 1, nonces) end
  check_tag(tree, tvb(at, 4), nonces and covered)
end

local function dissect_short(tvb, pinfo, tree)
  if tvb:len() < 54 then
    tree:add_proto_expert_info(experts.malformed, "shorter than headers and tag")
    return
  end
  pinfo.cols.info:set("")
  local mode = bit.band(tvb(0, 1):uint(), 3)
  local clear = mode == 0 and 34 or 16
  add_bits(add_structure(tree, tvb(0, clear), "frame_header", "Frame header"), tvb(0, 1), tvb(1, 1))
  if mode ~= 0 then
    pinfo.cols.info:set("sealed")
    tree:add(fields.sealed, tvb(16))
    if mode > 1 then tree:add_proto_expert_info(experts.malformed, "unknown mode") end
    return
  end
  local at, crcs, payloads = 34, 0, {}
  while tvb:len() - at > 4 * crcs + 4 do
    local next_at, data = dissect_message(tvb, pinfo, tree, at)
    if not next_at then
      tree:add_proto_expert_info(experts.malformed, data)
      return
    end
    if data then
      crcs = crcs + math.ceil(data:len() / 4096)
      payloads[#payloads + 1] = { range = data, offset = at + (tvb(at + 10, 1):uint() == 1 and 48 or 16) }
    end
    at = next_at
  end
  if tvb:len() - at ~= 4 * crcs + 4 then
    tree:add_proto_expert_info(experts.malformed, "messages do not end at the trailer")
    return
  end
  dissect_trailer(tvb, pinfo, tree, at, payloads)
end

function cirro.dissector(tvb, pinfo, root)
  pinfo.cols.protocol:set("CIRRO")
  local tree = root:add(cirro, tvb())
  if tvb:reported_len() > tvb:len() then
    tree:add_proto_expert_info(experts.malformed, "the capture cut this frame")
    return tvb:len()
  end
  local vt = tvb(0, 1):uint()
  if bit.rshift(vt, 5) ~= 1 then
    tree:add(fields.version, tvb(0, 1))
    tree:add_proto_expert_info(experts.malformed, "unknown version")
  elseif bit.band(vt, 0x10) ~= 0 then
    dissect_long(tvb, pinfo, tree)
  else
    dissect_short(tvb, pinfo, tree)
  end
  return tvb:len()
end

local ethertypes = DissectorTable.get("ethertype")
local bound = cirro.prefs.ethertype
ethertypes:add(bound, cirro)

function cirro.prefs_changed()
  if bound ~= cirro.prefs.ethertype then
    ethertypes:remove(bound, cirro)
    bound = cirro.prefs.ethertype
    ethertypes:add(bound, cirro)
  end
end
