-- Keys, time, events and the small moves that every operation is made of.
--
--   pissa:job:ID            hash: the job (a plan request is a job that no list shows)
--   pissa:job:ID:tasks      hash: task name -> {state, attempts, lost, retries, token, holder, ...}
--   pissa:job:ID:ready      zset: tasks that may be sent, in order
--   pissa:job:ID:held       set: tasks under a lease
--   pissa:job:ID:events     stream      pissa:job:ID:rows  hash: tensor -> manifest row
--   pissa:job:ID:plan       string      pissa:job:ID:manifest  string
--   pissa:leases            zset: "ID|task" -> when the lease runs out
--   pissa:delayed           zset: "ID|task" -> when it is due
--   pissa:turn:QUEUE        zset: jobs with ready tasks, in the order of their turns
--   pissa:sent:QUEUE        zset: "ID|task" -> when its message was sent; bounded by the window
--   pissa:served            hash: queue -> when a worker was last seen to serve it
--   pissa:queued            hash: owner -> how many of its jobs are queued
--   pissa:waiting           zset: queued jobs -> since when
--   pissa:finished          zset: finished jobs -> when they ended
--   pissa:totals            hash: what the metrics count; numbers that only grow
--   pissa:staging:DIGEST    set: jobs that may go on from what is staged under DIGEST
--   pissa:over              zset: digests that no job goes on from any more -> since when
--
-- Task states: ready -> sent -> leased -> done, with delayed in between for a retry.

local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local touched = {}

local function J(id) return 'pissa:job:' .. id end
local function sub(id, what) return 'pissa:job:' .. id .. ':' .. what end
local function member(id, t) return id .. '|' .. t end

local function get(id, field) return redis.call('HGET', J(id), field) end
local function set(id, ...) redis.call('HSET', J(id), ...) end
local function number(id, field) return tonumber(get(id, field) or '0') end

local function emit(id, kind, data)
  redis.call('XADD', sub(id, 'events'), 'MAXLEN', '~', 200000, '*',
    'type', kind, 'data', cjson.encode(data))
end

local function emit_json(id, kind, json)
  redis.call('XADD', sub(id, 'events'), 'MAXLEN', '~', 200000, '*', 'type', kind, 'data', json)
end

-- Tell of a wait; the job holds why, which counts for as long as its phase is `waiting`.
local function emit_wait(id, data)
  set(id, 'waiting', cjson.encode(data))
  emit(id, 'waiting', data)
end

local function count(what, by) redis.call('HINCRBY', 'pissa:totals', what, by or 1) end

local FINAL = { succeeded = true, failed = true, cancelled = true }

local function set_status(id, status)
  local before = get(id, 'status')
  if before == status then return end
  if get(id, 'kind') ~= 'plan' then
    if before then redis.call('HINCRBY', 'pissa:counts', before, -1) end
    redis.call('HINCRBY', 'pissa:counts', status, 1)
    local queued = (status == 'queued' and 1 or 0) - (before == 'queued' and 1 or 0)
    if queued ~= 0 then redis.call('HINCRBY', 'pissa:queued', get(id, 'owner'), queued) end
    if status == 'queued' then
      redis.call('ZADD', 'pissa:waiting', now, id)
    else
      redis.call('ZREM', 'pissa:waiting', id)
    end
    if FINAL[status] then count('ended:' .. status) end
  end
  set(id, 'status', status)
end

-- The time spent in the phase that ends is added up under ms:<phase>.
local function set_phase(id, phase)
  local before = get(id, 'phase')
  if before == phase then return end
  if before then
    local spent = now - number(id, 'phase_at')
    redis.call('HINCRBY', J(id), 'ms:' .. before, spent)
    -- A job that lies there done, until somebody resumes it, spends no time.
    if before ~= 'done' and get(id, 'kind') ~= 'plan' then count('ms:' .. before, math.max(spent, 0)) end
  end
  set(id, 'phase', phase, 'phase_at', now)
end

local function get_task(id, t)
  local text = redis.call('HGET', sub(id, 'tasks'), t)
  return text and cjson.decode(text)
end

local function put_task(id, t, task)
  redis.call('HSET', sub(id, 'tasks'), t, cjson.encode(task))
end

local function queue_of(id, t)
  return get(id, (t == 'prepare' or t == 'plan') and 'plan_queue' or 'work_queue')
end

local function order_of(t)
  return tonumber(string.match(t, '^shard:(%d+)$') or '-1')
end

-- Take a task out of every place that would move it on; its record stays.
local function unhook(id, t)
  local queue = queue_of(id, t)
  redis.call('ZREM', 'pissa:leases', member(id, t))
  redis.call('ZREM', 'pissa:delayed', member(id, t))
  redis.call('ZREM', 'pissa:sent:' .. queue, member(id, t))
  redis.call('ZREM', sub(id, 'ready'), t)
  redis.call('SREM', sub(id, 'held'), t)
  touched[queue] = true
end

local function drop_task(id, t)
  unhook(id, t)
  redis.call('HDEL', sub(id, 'tasks'), t)
end

local function put_ready(id, t, task)
  task.state, task.token, task.holder, task.worker = 'ready', nil, nil, nil
  task.since = now
  put_task(id, t, task)
  redis.call('ZADD', sub(id, 'ready'), order_of(t), t)
end

local function queue_up(id, queue)
  redis.call('SADD', 'pissa:queues', queue)
  if not redis.call('ZSCORE', 'pissa:turn:' .. queue, id) then
    redis.call('ZADD', 'pissa:turn:' .. queue, redis.call('INCR', 'pissa:turns'), id)
  end
  touched[queue] = true
end

local function make_ready(id, t, task)
  unhook(id, t)
  put_ready(id, t, task)
  queue_up(id, queue_of(id, t))
end

local function new_task() return { attempts = 0, lost = 0, retries = 0, bytes = 0, matrices = 0 } end

-- Send what the window of a queue has room for: one task of each job in turn, so that a job of
-- a thousand shards does not stand before a small one.
local function pump(queue, out)
  local window = tonumber(redis.call('HGET', 'pissa:windows', queue) or '2')
  while redis.call('ZCARD', 'pissa:sent:' .. queue) < window do
    local turn = redis.call('ZPOPMIN', 'pissa:turn:' .. queue)
    if #turn == 0 then return end
    local id = turn[1]
    local first = redis.call('ZPOPMIN', sub(id, 'ready'))
    if redis.call('ZCARD', sub(id, 'ready')) > 0 then
      redis.call('ZADD', 'pissa:turn:' .. queue, redis.call('INCR', 'pissa:turns'), id)
    end
    local task = #first > 0 and get_task(id, first[1])
    if task then
      task.state = 'sent'
      put_task(id, first[1], task)
      redis.call('ZADD', 'pissa:sent:' .. queue, now, member(id, first[1]))
      out[#out + 1] = { id = id, task = first[1], queue = queue }
    end
  end
end

local ops = {}
