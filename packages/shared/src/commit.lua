--[[
  commit: the only way in which a job record comes to be or changes its state.

  One step, all or nothing: checks that the record is where the caller believes it to be, writes the new state
  and fields, keeps the tenant's index of open jobs, appends the events to the tenant's event stream, and tells
  subscribers. A job that is a row of a batch moves the row's state byte and the batch's counters in the same step,
  so that counters always equal rows. Nothing of it happens when it refuses.

  KEYS[1]  job record       hash        {tenant}
  KEYS[2]  open jobs        sorted set  {tenant}  member: job id, score: updatedAt
  KEYS[3]  event stream     stream      {tenant}
  Of a job that is no row:
  KEYS[4]  finished jobs    sorted set  {tenant}  member: job id, score: when it finished; by it the oldest go
  Of a row:
  KEYS[4]  batch            hash        {tenant}  see batch.lua
  KEYS[5]  row states       string      {tenant}  one byte a row of this chunk, while the chunk is open
  KEYS[6]  ended chunks     set         {tenant}  "<batch id>/<chunk>": every row has ended, the part is to be written

  ARGV[1]  JSON:
    jobId, tenant, now (epoch ms)
    generation     the caller's; must equal the record's
    from           array of states in which the record must be; ["none"]: it must not exist
    to             the new state
    set            map of field -> string
    add            map of field -> integer to add
    clear          array of fields to remove
    raise          true: the record moves to generation + 1
    retention      seconds that a finished record is kept; a row's stays until its chunk is closed
    events         array of { id, event (JSON) }; of a row they are told only where its batch asks for `rows`. Nothing
                   trims the stream here: only what is archived may go (event-log.ts)
    eventsChannel  pub/sub channel on which the tenant's name says that there are events
    channel        pub/sub channel
    read           true: the answer holds the record as it is then
    batch          of a row: { id, chunk, row, index = row within the batch, tally = array of further counters to
                   raise when it ends, round = of the batch, when the record is created }

  Returns {outcome, state, generation, version, fields and values of the record when it is to be read}
    "committed"  the record is now in `to`
    "already"    same generation, and the record is in `to` or has gone on from there: a repetition of a step
                 that was done; the caller hands on and is done. A row that was fed before is one too.
    "cancelled" | "missing" | "refused"   nothing was changed; a row is refused while its batch does not run
--]]
local a = cjson.decode(ARGV[1])

local rank = {
  pending = -1, fetching = 0, queued = 1, decoding = 2, decoded = 3, classifying = 4,
  completed = 5, failed = 5, cancelled = 5,
}
local row_ended = { completed = 'c', failed = 'f', cancelled = 'x' }

local current = redis.call('HMGET', KEYS[1], 'state', 'generation', 'version')
local state, generation, version = current[1], tonumber(current[2]), tonumber(current[3]) or 0

local function answer(outcome)
  local record = a.read and redis.call('HGETALL', KEYS[1]) or {}
  return { outcome, state or 'none', generation or 0, version, record }
end

local expected = false
for _, wanted in ipairs(a.from) do
  if wanted == (state or 'none') then expected = true end
end

if state then
  if a.from[1] == 'none' then return answer('already') end
  if generation ~= a.generation then
    return answer(state == 'cancelled' and 'cancelled' or 'refused')
  end
  if state == 'cancelled' and a.to ~= 'cancelled' then return answer('cancelled') end
  -- A row ends once: it is tried again as a new record, after its chunk was closed.
  if a.batch and rank[state] == 5 then expected = false end
  if not expected then
    -- A finished record never counts as "gone on" towards another ending: completed is not failed.
    local gone_on = rank[state] > rank[a.to] and state ~= 'failed'
    if state == a.to or gone_on then return answer('already') end
    return answer('refused')
  end
elseif not expected then
  return answer('missing')
end

if rank[a.to] == 5 and not a.batch and redis.call('HEXISTS', KEYS[1], 'batch') == 1 then
  return redis.error_reply('a row of a batch ends together with its counters')
end

if a.batch then
  local byte = redis.call('GETRANGE', KEYS[5], a.batch.row, a.batch.row)
  local ending = row_ended[a.to]
  if not state then
    -- No string: the chunk was closed, with this row in it. Another byte: the row was fed before.
    if byte ~= '.' then return answer('already') end
    local batch = redis.call('HMGET', KEYS[4], 'state', 'round')
    -- Of another round: prepared before the batch ended and was tried again.
    if batch[1] ~= 'running' or a.batch.round ~= (tonumber(batch[2]) or 0) then return answer('refused') end
  end
  if ending or not state then
    redis.call('SETRANGE', KEYS[5], a.batch.row, ending or 'o')
    redis.call('HINCRBY', KEYS[4], state and 'open' or 'waiting', -1)
    redis.call('HINCRBY', KEYS[4], ending and a.to or 'open', 1)
  end
  -- The first failures are told with the batch, long before its results are read.
  if a.to == 'failed' and a.set.error and (tonumber(redis.call('HGET', KEYS[4], 'faultsTold')) or 0) < 20 then
    local fault = redis.call('HINCRBY', KEYS[4], 'faultsTold', 1)
    redis.call('HSET', KEYS[4], 'fault:' .. fault, cjson.encode({ row = a.batch.index, error = a.set.error }))
  end
  if ending then
    for _, counter in ipairs(a.batch.tally) do redis.call('HINCRBY', KEYS[4], counter, 1) end
    if redis.call('HINCRBY', KEYS[4], 'left:' .. a.batch.chunk, -1) == 0 then
      redis.call('SADD', KEYS[6], a.batch.id .. '/' .. a.batch.chunk)
    end
  end
end

if a.raise then generation = a.generation + 1 else generation = a.generation end
version = version + 1
state = a.to

local fields = { 'state', state, 'generation', generation, 'version', version, 'updatedAt', string.format('%.0f', a.now) }
for field, value in pairs(a.set) do
  fields[#fields + 1] = field
  fields[#fields + 1] = value
end
redis.call('HSET', KEYS[1], unpack(fields))
for field, amount in pairs(a.add) do redis.call('HINCRBY', KEYS[1], field, amount) end
if #a.clear > 0 then redis.call('HDEL', KEYS[1], unpack(a.clear)) end

if rank[state] == 5 then
  redis.call('ZREM', KEYS[2], a.jobId)
  if not a.batch then
    redis.call('ZADD', KEYS[4], a.now, a.jobId)
    redis.call('EXPIRE', KEYS[1], a.retention)
  end
else
  redis.call('ZADD', KEYS[2], a.now, a.jobId)
  if not a.batch then redis.call('PERSIST', KEYS[1]) end
end

local told, callback
if #a.events > 0 and a.batch then
  told, callback = unpack(redis.call('HMGET', KEYS[4], 'notify', 'callback'))
  told = told == 'rows'
elseif #a.events > 0 then
  told, callback = true, redis.call('HGET', KEYS[1], 'callback')
end
if told then
  for _, event in ipairs(a.events) do
    if callback then
      redis.call('XADD', KEYS[3], '*', 'id', event.id, 'event', event.event, 'callback', callback)
    else
      redis.call('XADD', KEYS[3], '*', 'id', event.id, 'event', event.event)
    end
  end
  redis.call('PUBLISH', a.eventsChannel, a.tenant)
end

-- Of a row only what stops a worker is told: nobody watches one row of a million.
if not a.batch or state == 'cancelled' then
  redis.call('PUBLISH', a.channel, cjson.encode({
    tenant = a.tenant, jobId = a.jobId, state = state, generation = generation, version = version,
  }))
end
return answer('committed')
