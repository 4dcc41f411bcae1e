--[[
  batch: every change of a batch that is not a change of one of its rows (those are commit.lua's).

  A batch is a hash of facts and counters. Its rows wait in chunks of 1,000 in object storage; only chunks that are
  OPEN are known to Redis, by a string of one byte a row and a count of the rows that have not ended:

    .  waits to be fed     o  is a job     c  completed     f  failed     x  cancelled
    k  of a chunk opened again for its failed rows: a row that keeps the result it has

  rows = waiting + open + completed + failed + cancelled, always.

  KEYS[1]  batch            hash    {tenant}
  KEYS[2]  active batches   set     {tenant}  ids of batches that have not ended
  KEYS[3]  event stream     stream  {tenant}
  KEYS[4]  ended            set     {tenant}  "<batch id>/<chunk>": the part is to be written; "<batch id>/batch": the
                                              batch has ended, and is to be written where it outlives Redis
  KEYS[5]  row states       string  {tenant}  of the chunk in question (any name where there is none)
  KEYS[6..]                         {tenant}  close: records of the chunk's rows, which go

  ARGV[1]  JSON: op, id, now (epoch ms), iso (the same time as text), retention (seconds), eventsKept, and by op:
    append   chunk, rows, bad, walked, last  a further chunk of the manifest lies in storage; the last one seals
    seal     bad, firstBad, error          the manifest is complete; with an error the batch ends as failed
    open     chunk, rows                   the chunk after the last one is opened
    reopen   chunk, states, failed         of a retry: opened again for rows whose state is '.'
    skip     chunk                         of a retry: nothing in this chunk failed
    close    chunk, tally (counter -> amount), event
    cancel | pause | resume                by the caller
    cancelRows  chunk                      after cancel: rows that were never fed end
    retry    revision                      what has failed is tried again
    progress rate, tell                    rows that end per second, lately; told to the event stream now and then
    saved                                  the batch that ended lies in storage

  Returns {outcome, state}: "done" | "already" (so it is, or was before) | "refused" | "missing"
--]]
local a = cjson.decode(ARGV[1])
local batch, active, events, ended, states = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]

local function get(field) return redis.call('HGET', batch, field) end
local function number(field) return tonumber(get(field)) or 0 end
local function add(field, amount) return redis.call('HINCRBY', batch, field, amount) end

local state = get('state')
if not state then return { 'missing', 'none' } end

local function become(to)
  state = to
  redis.call('HSET', batch, 'state', to)
end

local function tell(type, more)
  local event = { type = type, timestamp = a.iso, batchId = a.id }
  for key, value in pairs(more or {}) do event[key] = value end
  redis.call('XADD', events, 'MAXLEN', '~', a.eventsKept, '*', 'event', cjson.encode(event))
end

local function counts()
  local found = {}
  for _, counter in ipairs({ 'rows', 'bad', 'completed', 'failed', 'cancelled', 'reused' }) do
    found[counter] = number(counter)
  end
  return found
end

-- Ends the batch when nothing of it is left to do.
local function settle()
  local opened, closed, chunks = number('opened'), number('closed'), number('chunks')
  local to
  if state == 'cancelling' and closed == opened then
    to = 'cancelled'
  elseif (state == 'running' or state == 'paused') and number('sealed') == 1 and closed == chunks
    and opened == chunks and tonumber(get('retryNext') or chunks) == chunks then
    to = get('error') and 'failed' or 'completed'
  else
    return
  end
  become(to)
  redis.call('HSET', batch, 'endedAt', string.format('%.0f', a.now))
  redis.call('HDEL', batch, 'retryNext')
  redis.call('SREM', active, a.id)
  redis.call('SADD', ended, a.id .. '/batch')
  redis.call('EXPIRE', batch, a.retention)
  tell('batch.' .. to, { counts = counts() })
end

local function done()
  redis.call('HSET', batch, 'updatedAt', string.format('%.0f', a.now))
  return { 'done', state }
end
if a.op == 'append' then
  if state ~= 'receiving' and state ~= 'running' and state ~= 'paused' then return { 'refused', state } end
  if number('sealed') == 1 then return { 'refused', state } end
  if number('chunks') ~= a.chunk then return { 'already', state } end
  add('chunks', 1)
  add('rows', a.rows)
  add('waiting', a.rows)
  add('bad', a.bad)
  if a.walked then redis.call('HSET', batch, 'walked', a.walked) end
  if a.last then redis.call('HSET', batch, 'sealed', 1) end
  return done()

elseif a.op == 'seal' then
  if number('sealed') == 1 then return { 'already', state } end
  if state ~= 'receiving' and state ~= 'running' and state ~= 'paused' then return { 'refused', state } end
  redis.call('HSET', batch, 'sealed', 1)
  add('bad', a.bad)
  if a.firstBad then redis.call('HSET', batch, 'firstBad', a.firstBad) end
  if a.error then redis.call('HSET', batch, 'error', a.error) end
  if state == 'receiving' then become('running') end
  settle()
  return done()

elseif a.op == 'open' then
  if state ~= 'running' then return { 'refused', state } end
  if number('opened') ~= a.chunk then return { 'already', state } end
  if a.chunk >= number('chunks') then return { 'refused', state } end
  redis.call('SET', states, string.rep('.', a.rows))
  redis.call('HSET', batch, 'left:' .. a.chunk, a.rows)
  add('opened', 1)
  return done()

elseif a.op == 'reopen' or a.op == 'skip' then
  if state ~= 'running' then return { 'refused', state } end
  if tonumber(get('retryNext') or -1) ~= a.chunk then return { 'already', state } end
  redis.call('HSET', batch, 'retryNext', a.chunk + 1)
  if a.op == 'reopen' then
    redis.call('SET', states, a.states)
    redis.call('HSET', batch, 'left:' .. a.chunk, a.failed)
    add('closed', -1)
    add('failed', -a.failed)
    add('waiting', a.failed)
  end
  settle()
  return done()

elseif a.op == 'close' then
  if redis.call('SREM', ended, a.id .. '/' .. a.chunk) == 0 then return { 'already', state } end
  redis.call('DEL', states)
  redis.call('HDEL', batch, 'left:' .. a.chunk)
  add('closed', 1)
  for counter, amount in pairs(a.tally) do add(counter, amount) end
  for at = 6, #KEYS do redis.call('UNLINK', KEYS[at]) end
  tell('results.part', a.event)
  settle()
  return done()

elseif a.op == 'cancel' then
  if state == 'cancelling' or state == 'cancelled' then return { 'already', state } end
  if state ~= 'receiving' and state ~= 'running' and state ~= 'paused' then return { 'refused', state } end
  become('cancelling')
  local waiting = number('waiting')
  add('waiting', -waiting)
  add('cancelled', waiting)
  settle()
  return done()

elseif a.op == 'cancelRows' then
  if state ~= 'cancelling' then return { 'refused', state } end
  local bytes = redis.call('GET', states)
  if not bytes then return { 'already', state } end
  local kept, waiting = string.gsub(bytes, '%.', 'x')
  if waiting == 0 then return { 'already', state } end
  redis.call('SET', states, kept)
  if add('left:' .. a.chunk, -waiting) == 0 then redis.call('SADD', ended, a.id .. '/' .. a.chunk) end
  return done()

elseif a.op == 'pause' or a.op == 'resume' then
  local from, to = 'running', 'paused'
  if a.op == 'resume' then from, to = to, from end
  if state == to then return { 'already', state } end
  if state ~= from then return { 'refused', state } end
  become(to)
  return done()

elseif a.op == 'retry' then
  if state ~= 'completed' and state ~= 'failed' then return { 'refused', state } end
  become('running')
  add('round', 1)
  redis.call('HSET', batch, 'retryNext', 0, 'revision', a.revision)
  redis.call('HDEL', batch, 'endedAt', 'error')
  redis.call('PERSIST', batch)
  redis.call('SADD', active, a.id)
  settle()
  return done()

elseif a.op == 'progress' then
  if state ~= 'running' then return { 'refused', state } end
  redis.call('HSET', batch, 'rate', a.rate)
  if a.tell then tell('batch.progress', { counts = counts() }) end
  return { 'done', state }

elseif a.op == 'saved' then
  return { redis.call('SREM', ended, a.id .. '/batch') == 1 and 'done' or 'already', state }
end

return redis.error_reply('no such operation: ' .. tostring(a.op))
