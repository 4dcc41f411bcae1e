--[[
  batch: every change of a batch that is not a change of one of its rows (those are commit.lua's).

  A batch is a hash of facts and counters. Its rows wait in chunks of 1,000 in object storage; only chunks that are
  OPEN are known to Redis, by a string of one byte a row and a count of the rows that have not ended (`left:<chunk>`):

    .  waits to be fed     o  is a job     c  completed     f  failed     x  cancelled
    k  of a chunk opened again for its failed rows: a row that keeps the result it has

  rows = waiting + open + completed + failed + cancelled, always. From the moment of a cancel the rows that wait count
  as cancelled, though their bytes become `x` only chunk by chunk.

  KEYS[1]  batch            hash        {tenant}
  KEYS[2]  active batches   set         {tenant}  ids of batches that have not ended
  KEYS[3]  event stream     stream      {tenant}
  KEYS[4]  ended            set         {tenant}  "<batch id>/<chunk>": the part is to be written; "<batch id>/batch":
                                                  the batch has ended, and is to be written where it outlives Redis
  KEYS[5]  batches          sorted set  {tenant}  every batch that is known here; score: when it was made
  KEYS[6]  deleted          string      {tenant}  when it was deleted (epoch ms)
  KEYS[7]  row states       string      {tenant}  of the chunk in question (any name where there is none)
  KEYS[8..]                             {tenant}  close: records of the chunk's rows, which go

  ARGV[1]  JSON: op, id, tenant, now (epoch ms), iso (the same time as text), retention (seconds), eventsChannel, chunkRows, and
  by op:
    append   chunk, rows, bad, walked, last  a further chunk of the manifest lies in storage; the last one seals
    seal     bad, firstBad, error          the manifest is complete; with an error the batch ends as failed
    open     chunk                         the chunk after the last one is opened
    reopen   chunk, states                 of a retry: opened again for rows whose state is '.'; passed over without
    close    chunk, round, states, tally (counter -> amount), part (rows, completed, failed, cancelled)
                                           when it is still as the closer found it
    cancel | pause | resume                by the caller
    cancelRows  chunk                      after cancel: rows that were never fed end
    retry    revision                      what has failed is tried again: rows, and a walk or copy that broke off
    progress rate, tell                    rows that end per second, lately; told to the event stream now and then
    saved    endedAt                       the batch lies in storage as it ended then
    remove   deletedAt                     forgets a batch that has ended; without a date as if it had never been

  Returns {outcome, state}
    "done" | "already" (so it is, or it was done before) | "refused" | "missing"
--]]
local a = cjson.decode(ARGV[1])
local batch, active, events, ended, list, deleted, states = unpack(KEYS, 1, 7)

local function get(field) return redis.call('HGET', batch, field) end
local function number(field) return tonumber(get(field)) or 0 end
local function add(field, amount) return redis.call('HINCRBY', batch, field, amount) end
local function set(...) redis.call('HSET', batch, ...) end

local state = get('state') or 'none'
local has_ended = state == 'completed' or state == 'cancelled' or state == 'failed'

if a.op == 'remove' then
  if state ~= 'none' and not has_ended then return { 'refused', state } end
  redis.call('DEL', batch)
  redis.call('ZREM', list, a.id)
  redis.call('SREM', active, a.id)
  redis.call('SREM', ended, a.id .. '/batch')
  if a.deletedAt then redis.call('SET', deleted, string.format('%.0f', a.deletedAt), 'EX', 366 * 24 * 3600, 'NX') end
  return { 'done', 'none' }
end

if state == 'none' then
  -- Of a batch that is no more nothing is left to be written.
  if a.op == 'close' then redis.call('SREM', ended, a.id .. '/' .. a.chunk) end
  if a.op == 'saved' then redis.call('SREM', ended, a.id .. '/batch') end
  return { 'missing', state }
end

local takes_rows = state == 'receiving' or state == 'running' or state == 'paused'
local sealed = number('sealed') == 1

local function become(to)
  state = to
  set('state', to)
end

local function counts()
  local found = {}
  for _, counter in ipairs({ 'rows', 'bad', 'completed', 'failed', 'cancelled', 'reused' }) do
    found[counter] = number(counter)
  end
  return found
end

-- `id`: what makes it another event than those before, so that a step that is repeated tells the same one. The shape is
-- that of events.ts; the stream is trimmed by who archives it (event-log.ts).
local function tell(type, id, more)
  if get('notify') == 'none' then return end
  local error = get('error')
  local data = {
    batchId = a.id,
    name = get('name') or cjson.null,
    class = get('class'),
    revision = number('revision'),
    counts = counts(),
    model = {
      name = get('modelName'), version = get('modelVersion'), digest = get('modelDigest'), profile = get('profileHash'),
    },
  }
  if more then data.part = more else data.error = error and cjson.decode(error) or cjson.null end
  local event = cjson.encode({ type = type, timestamp = a.iso, data = data })
  local entry = { events, '*', 'id', 'evt_' .. a.id .. '_' .. id, 'event', event }
  local callback = get('callback')
  if callback then
    entry[#entry + 1] = 'callback'
    entry[#entry + 1] = callback
  end
  redis.call('XADD', unpack(entry))
  redis.call('PUBLISH', a.eventsChannel, a.tenant)
end

-- Ends the batch when nothing of it is left to do.
local function settle()
  local opened, closed, chunks = number('opened'), number('closed'), number('chunks')
  local to
  if state == 'cancelling' and closed == opened then
    to = 'cancelled'
  elseif (state == 'running' or state == 'paused') and number('sealed') == 1 and closed == chunks
    and opened == chunks and not get('retryNext') then
    to = get('error') and 'failed' or 'completed'
  else
    return
  end
  become(to)
  set('endedAt', string.format('%.0f', a.now))
  redis.call('HDEL', batch, 'retryNext')
  redis.call('SREM', active, a.id)
  redis.call('SADD', ended, a.id .. '/batch')
  redis.call('EXPIRE', batch, a.retention)
  tell('batch.' .. to, number('round') .. '_' .. to)
end

local function done()
  set('updatedAt', string.format('%.0f', a.now))
  settle()
  return { 'done', state }
end

if a.op == 'append' then
  local chunks = number('chunks')
  if a.chunk < chunks then return { 'already', state } end
  if sealed or not takes_rows or a.chunk > chunks then return { 'refused', state } end
  if number('rows') ~= chunks * a.chunkRows or a.rows < 1 or a.rows > a.chunkRows then
    return redis.error_reply('every chunk but the last is full, and none is empty')
  end
  add('chunks', 1)
  add('rows', a.rows)
  add('waiting', a.rows)
  add('bad', a.bad)
  if a.walked then set('walked', a.walked) end
  if a.last then
    set('sealed', 1)
    if state == 'receiving' then become('running') end
  end
  return done()

elseif a.op == 'seal' then
  if sealed then return { 'already', state } end
  if not takes_rows then return { 'refused', state } end
  set('sealed', 1)
  add('bad', a.bad)
  if a.firstBad then set('firstBad', a.firstBad) end
  if a.error then set('error', a.error) end
  if state == 'receiving' then become('running') end
  return done()

elseif a.op == 'open' then
  local opened = number('opened')
  if a.chunk < opened then return { 'already', state } end
  -- What a retry opens again comes first: until then nobody can tell closed chunks from those of this round.
  if state ~= 'running' or get('retryNext') or a.chunk > opened or a.chunk >= number('chunks') then
    return { 'refused', state }
  end
  local rows = math.min(a.chunkRows, number('rows') - a.chunk * a.chunkRows)
  redis.call('SET', states, string.rep('.', rows))
  set('left:' .. a.chunk, rows)
  add('opened', 1)
  return done()

elseif a.op == 'reopen' then
  local next = tonumber(get('retryNext'))
  if not next or a.chunk < next then return { 'already', state } end
  if state ~= 'running' or a.chunk > next then return { 'refused', state } end
  local _, failed = string.gsub(a.states, '%.', '')
  if next + 1 == number('opened') then redis.call('HDEL', batch, 'retryNext') else set('retryNext', next + 1) end
  if failed > 0 then
    redis.call('SET', states, a.states)
    set('left:' .. a.chunk, failed)
    add('closed', -1)
    add('failed', -failed)
    add('waiting', failed)
  end
  return done()

elseif a.op == 'close' then
  local member = a.id .. '/' .. a.chunk
  if redis.call('SISMEMBER', ended, member) == 0 then return { 'already', state } end
  -- Closed by another and opened again meanwhile: what this closer has written is of an earlier round.
  if redis.call('GET', states) ~= a.states or number('round') ~= a.round then return { 'refused', state } end
  redis.call('SREM', ended, member)
  redis.call('DEL', states)
  redis.call('HDEL', batch, 'left:' .. a.chunk)
  add('closed', 1)
  for counter, amount in pairs(a.tally) do add(counter, amount) end
  for at = 8, #KEYS do redis.call('UNLINK', KEYS[at]) end
  local part = a.part
  part.number = a.chunk
  part.from = a.chunk * a.chunkRows
  part.to = part.from + part.rows
  part.rows = nil
  tell('results.part', number('round') .. '_part' .. a.chunk, part)
  return done()

elseif a.op == 'cancel' then
  if state == 'cancelling' or state == 'cancelled' then return { 'already', state } end
  if not takes_rows then return { 'refused', state } end
  become('cancelling')
  local waiting = number('waiting')
  -- Not `-waiting`: Redis takes no -0.
  add('waiting', 0 - waiting)
  add('cancelled', waiting)
  return done()

elseif a.op == 'cancelRows' then
  if state ~= 'cancelling' then return { 'refused', state } end
  local kept, waiting = string.gsub(redis.call('GET', states) or '', '%.', 'x')
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
  -- A walk or a copy goes on where it broke off; a manifest that could not be read is not sent again.
  local resumes = get('error') and cjson.decode(get('origin')).kind ~= 'manifest'
  if number('failed') == 0 and not resumes then return { 'already', state } end
  become('running')
  add('round', 1)
  set('revision', a.revision)
  if number('opened') > 0 then set('retryNext', 0) end
  if resumes then
    set('sealed', 0)
    redis.call('HDEL', batch, 'error')
  end
  redis.call('HDEL', batch, 'endedAt', 'faultsTold')
  for fault = 1, 20 do redis.call('HDEL', batch, 'fault:' .. fault) end
  redis.call('PERSIST', batch)
  redis.call('SADD', active, a.id)
  return done()

elseif a.op == 'progress' then
  if state ~= 'running' then return { 'refused', state } end
  set('rate', a.rate)
  if a.tell then tell('batch.progress', 'progress' .. string.format('%.0f', a.now)) end
  return done()

elseif a.op == 'saved' then
  -- It may have been tried again meanwhile, and have ended once more.
  if get('endedAt') ~= string.format('%.0f', a.endedAt) then return { 'refused', state } end
  return { redis.call('SREM', ended, a.id .. '/batch') == 1 and 'done' or 'already', state }
end

return redis.error_reply('no such operation: ' .. tostring(a.op))
