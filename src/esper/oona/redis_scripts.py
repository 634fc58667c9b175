"""What must happen at once on a Redis server, as Lua. Each script touches one key, so all of it works on a cluster.

They are sent whole each time: half a kilobyte beside a batch, and a server that was restarted needs no second try.
"""

from __future__ import annotations

_NEEDED = """
-- The oldest entry that some group still needs; nil without groups. Also the group that needs it.
local function needed(key)
  local oldest_ms, oldest_seq, oldest, slowest
  if redis.call('EXISTS', key) == 0 then return nil end
  for _, info in ipairs(redis.call('XINFO', 'GROUPS', key)) do
    local fields = {}
    for i = 1, #info, 2 do fields[info[i]] = info[i + 1] end
    local id = fields['last-delivered-id']
    if fields['pending'] > 0 then id = redis.call('XPENDING', key, fields['name'])[2] end
    local ms, seq = string.match(id, '^(%d+)-(%d+)$')
    ms, seq = tonumber(ms), tonumber(seq)
    if not oldest or ms < oldest_ms or (ms == oldest_ms and seq < oldest_seq) then
      oldest_ms, oldest_seq, oldest, slowest = ms, seq, id, fields['name']
    end
  end
  return oldest, slowest
end
-- What all groups are done with goes, but for about the newest `retention`: whoever comes later finds those.
local function trim(key, retention)
  local oldest, slowest = needed(key)
  if oldest then
    local spare = redis.call('XLEN', key) - tonumber(retention)
    if spare > 0 then redis.call('XTRIM', key, 'MINID', '~', oldest, 'LIMIT', spare) end
  else
    redis.call('XTRIM', key, 'MAXLEN', '~', retention)
  end
  return slowest
end
"""

TRIM = (
    _NEEDED
    + """
trim(KEYS[1], ARGV[1])
return 0
"""
)
"""KEYS stream; ARGV retention. Let go of what every group of a durable topic is done with."""

PUBLISH_DURABLE = (
    _NEEDED
    + """
local key, retention, most, most_bytes = KEYS[1], ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local slowest = trim(key, retention)
local num, bytes = redis.call('XLEN', key), redis.call('MEMORY', 'USAGE', key) or 0
if num >= most or bytes >= most_bytes then
  trim(key, 0)
  num, bytes = redis.call('XLEN', key), redis.call('MEMORY', 'USAGE', key) or 0
end
if num >= most or bytes >= most_bytes then return {num, bytes, slowest or ''} end
for i = 4, #ARGV, 2 do redis.call('XADD', key, '*', 'k', ARGV[i], 'v', ARGV[i + 1]) end
return 0
"""
)
"""KEYS stream; ARGV retention, most entries, most bytes, then key and value of each message. 0, or what fills it."""

PUBLISH_LOSSY = """
local key, retention = KEYS[1], ARGV[1]
for i = 2, #ARGV, 2 do
  redis.call('XADD', key, 'MAXLEN', '~', retention, '*', 'k', ARGV[i], 'v', ARGV[i + 1])
end
return 0
"""
"""KEYS stream; ARGV retention, then key and value of each message."""

LEAVE = """
local key, group, consumer, heir = KEYS[1], ARGV[1], ARGV[2], ARGV[3]
local from = '-'
while true do
  local pending = redis.call('XPENDING', key, group, from, '+', 500, consumer)
  if #pending == 0 then break end
  local command = {'XCLAIM', key, group, heir, 0}
  for _, entry in ipairs(pending) do command[#command + 1] = entry[1] end
  -- As if it had been lying since the beginning of time: the next member that looks takes it.
  for _, word in ipairs({'TIME', '1', 'JUSTID'}) do command[#command + 1] = word end
  redis.call(unpack(command))
  from = '(' .. pending[#pending][1]
end
return redis.call('XGROUP', 'DELCONSUMER', key, group, consumer)
"""
"""KEYS stream; ARGV group, consumer, heir. What the consumer holds goes to the heir, then the consumer is gone."""

SWEEP = """
local key, group, idle_ms = KEYS[1], ARGV[1], tonumber(ARGV[2])
for _, info in ipairs(redis.call('XINFO', 'CONSUMERS', key, group)) do
  local fields = {}
  for i = 1, #info, 2 do fields[info[i]] = info[i + 1] end
  if fields['pending'] == 0 and fields['idle'] > idle_ms then
    redis.call('XGROUP', 'DELCONSUMER', key, group, fields['name'])
  end
end
return 0
"""
"""KEYS stream; ARGV group, milliseconds. Forget members that hold nothing and were not heard of for so long."""
