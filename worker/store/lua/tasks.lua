-- What workers do to a task they hold. Every write names the token of its lease: one whose lease
-- was given to another worker is told so and changes nothing.

local PHASES = { prepare = 'planning', plan = 'planning', publish = 'publishing' }

local function held(a)
  local task = get_task(a.id, a.task)
  if task and task.state == 'leased' and task.token == a.token then return task end
  return nil
end

local LOST = { lost = true }

local function answer(a)
  local ending = get(a.id, 'ending')
  if ending and not get(a.id, 'published') and a.task ~= 'discard' then return { stop = ending } end
  if redis.call('SISMEMBER', 'pissa:draining', a.worker) == 1 then return { stop = 'drain' } end
  return {}
end

local function remember_peak(a)
  if a.peak then
    local highest = tonumber(redis.call('HGET', 'pissa:workers:peak', a.worker) or '0')
    redis.call('HSET', 'pissa:workers:peak', a.worker, math.max(a.peak, highest))
  end
  if a.peak and a.peak > number(a.id, 'peak') then set(a.id, 'peak', a.peak) end
end

-- Counted once however often a task is tried; what an earlier attempt had done is told apart.
local function count_work(a, matrices, bytes)
  local how = a.resumed and ':resumed' or ':done'
  count('matrices' .. how, math.max(matrices, 0))
  count('bytes' .. how, math.max(bytes, 0))
end

local function note_start(a, task)
  if task.attempts > 1 or a.task == 'prepare' then redis.call('HINCRBY', J(a.id), 'attempts', 1) end
  if a.task ~= 'discard' then
    set_phase(a.id, PHASES[a.task] or 'shards')
    if get(a.id, 'status') == 'queued' then
      set(a.id, 'started', now)
      set_status(a.id, 'running')
      emit(a.id, 'started', { attempt = number(a.id, 'attempts') })
    end
  end
end

function ops.claim(a)
  local task = get_task(a.id, a.task)
  if not task then return { refused = 'gone' } end
  local again = task.state == 'leased' and task.token == a.token
  if not again then
    if task.state ~= 'ready' and task.state ~= 'sent' then return { refused = task.state } end
    if redis.call('SISMEMBER', 'pissa:draining', a.worker) == 1 then
      make_ready(a.id, a.task, task)
      return { refused = 'drain' }
    end
    unhook(a.id, a.task)
    task.attempts = task.attempts + 1
    task.state, task.token, task.worker, task.holder = 'leased', a.token, a.worker, a.holder
    put_task(a.id, a.task, task)
    redis.call('SADD', sub(a.id, 'held'), a.task)
    redis.call('ZADD', 'pissa:leases', now + a.lease_ms, member(a.id, a.task))
    note_start(a, task)
  end
  return { job = redis.call('HMGET', J(a.id), 'request', 'kind', 'token', 'digest', 'discard',
    'published', 'request_id'), attempts = task.attempts }
end

function ops.renew(a)
  if not held(a) then return LOST end
  redis.call('ZADD', 'pissa:leases', now + a.lease_ms, member(a.id, a.task))
  return answer(a)
end

function ops.look(a)
  if not held(a) then return LOST end
  return answer(a)
end

-- Give a task back: unharmed, if the worker is stopping; for good, if the job is ending.
function ops.release(a)
  local task = held(a)
  if not task then return LOST end
  drop_task(a.id, a.task)
  if get(a.id, 'ending') and a.task ~= 'discard' and not get(a.id, 'published') then
    maybe_end(a.id)
  else
    task.attempts = task.attempts - 1
    make_ready(a.id, a.task, task)
  end
  return {}
end

function ops.lose(a)
  local task = held(a)
  if not task then return LOST end
  if not a.dead and (tonumber(redis.call('ZSCORE', 'pissa:leases', member(a.id, a.task))) or 0) > now
  then return LOST end
  lose(a.id, a.task, task, a)
  return {}
end

function ops.fail(a)
  if not held(a) then return LOST end
  drop_task(a.id, a.task)
  if a.task == 'discard' or get(a.id, 'published') then
    finalize(a.id, get(a.id, 'ending'))
  elseif get(a.id, 'ending') then
    maybe_end(a.id)
  else
    fail_job(a.id, a.error, a.discard)
  end
  return {}
end

-- Try again later: this task, or with `restart` the whole job from its plan on, because what the
-- plan was made from has changed. Sealed work is found again either way.
function ops.retry(a)
  local task = held(a)
  if not task then return LOST end
  if get(a.id, 'ending') then return ops.release(a) end
  local tries = a.restart and redis.call('HINCRBY', J(a.id), 'restarts', 1) or task.retries + 1
  if tries > a.max_retries then
    a.error = a.exhausted or a.error
    return ops.fail(a)
  end
  local t = a.task
  drop_task(a.id, t)
  if a.restart then
    for _, other in ipairs(redis.call('HKEYS', sub(a.id, 'tasks'))) do drop_task(a.id, other) end
    start_over(a.id)
    t, task = 'prepare', new_task()
  end
  task.retries, task.state, task.token = tries, 'delayed', nil
  put_task(a.id, t, task)
  local delay = a.retry_ms * 2 ^ (tries - 1)
  redis.call('ZADD', 'pissa:delayed', now + delay, member(a.id, t))
  if redis.call('SCARD', sub(a.id, 'held')) == 0 then set_phase(a.id, 'waiting') end
  local data = cjson.decode(a.error)
  count('retried:' .. data.code)
  emit_wait(a.id, { task = t, code = data.code, message = data.message, delay_s = delay / 1000 })
  return {}
end

function ops.planned(a)
  if not held(a) then return LOST end
  drop_task(a.id, 'prepare')
  local before = get(a.id, 'digest')
  if before and before ~= a.digest then abandon(a.id, before) end
  set(a.id, 'digest', a.digest, 'matrices_total', a.matrices, 'bytes_total', a.bytes,
    'shards_total', #a.shards, 'shards_at', now)
  redis.call('SADD', 'pissa:staging:' .. a.digest, a.id)
  redis.call('ZREM', 'pissa:over', a.digest)
  redis.call('SET', sub(a.id, 'plan'), a.plan)
  emit(a.id, 'planned', { matrices = a.matrices, bytes = a.bytes, shards = #a.shards,
    notes = #a.notes > 0 and a.notes or nil })
  if get(a.id, 'ending') then
    maybe_end(a.id)
    return {}
  end
  set_phase(a.id, 'shards')
  -- There may be ten thousand, and nobody else is answered meanwhile: no call is made twice.
  for index, _ in ipairs(a.shards) do put_ready(a.id, 'shard:' .. (index - 1), new_task()) end
  if #a.shards > 0 then queue_up(a.id, get(a.id, 'work_queue')) end
  return {}
end

function ops.shard_started(a)
  if not held(a) then return LOST end
  emit(a.id, 'shard_started', { shard = a.shard, matrices = a.matrices, resumed = a.resumed })
  return answer(a)
end

function ops.matrix_done(a)
  local task = held(a)
  if not task then return LOST end
  set_phase(a.id, 'shards')
  if redis.call('HSET', sub(a.id, 'rows'), a.tensor, a.row) == 1 then
    redis.call('HINCRBY', J(a.id), 'matrices_done', 1)
    redis.call('HINCRBY', J(a.id), 'bytes_done', a.nbytes)
    if a.resumed then redis.call('HINCRBY', J(a.id), 'bytes_resumed', a.nbytes) end
    count_work(a, 1, a.nbytes)
    task.bytes, task.matrices = task.bytes + a.nbytes, task.matrices + 1
    put_task(a.id, a.task, task)
    emit_json(a.id, 'matrix_done', a.event)
  end
  return answer(a)
end

function ops.shard_done(a)
  local task = held(a)
  if not task then return LOST end
  unhook(a.id, a.task)
  put_task(a.id, a.task, { state = 'done' })
  for tensor, row in pairs(a.rows or {}) do redis.call('HSET', sub(a.id, 'rows'), tensor, row) end
  redis.call('HINCRBY', J(a.id), 'matrices_done', a.matrices - task.matrices)
  redis.call('HINCRBY', J(a.id), 'bytes_done', a.nbytes - task.bytes)
  if a.resumed then redis.call('HINCRBY', J(a.id), 'bytes_resumed', a.nbytes - task.bytes) end
  count_work(a, a.matrices - task.matrices, a.nbytes - task.bytes)
  count('shards' .. (a.resumed and ':resumed' or ':done'))
  local done = redis.call('HINCRBY', J(a.id), 'shards_done', 1)
  remember_peak(a)
  emit(a.id, 'shard_done', { shard = a.shard, resumed = a.resumed or false, bytes = a.nbytes,
    shards = { done = done, total = number(a.id, 'shards_total') } })
  if get(a.id, 'ending') then
    maybe_end(a.id)
  elseif done == number(a.id, 'shards_total') then
    make_ready(a.id, 'publish', new_task())
  end
  return {}
end

-- The task waits for the Hub; the job does, where no other task of it goes on.
function ops.waiting(a)
  if not held(a) then return LOST end
  emit_wait(a.id, { task = a.task, code = a.code, message = a.message, delay_s = a.seconds })
  if a.task ~= 'discard' and redis.call('SCARD', sub(a.id, 'held')) == 1 then
    set_phase(a.id, 'waiting')
  end
  return answer(a)
end

function ops.going_on(a)
  if not held(a) then return LOST end
  if a.task ~= 'discard' and get(a.id, 'phase') == 'waiting' then
    set_phase(a.id, PHASES[a.task] or 'shards')
  end
  return answer(a)
end

function ops.publishing(a)
  if not held(a) then return LOST end
  emit(a.id, 'publishing', {})
  return answer(a)
end

-- The result is visible: from here on the job can only succeed. The lease is kept until what was
-- staged is gone, so that a worker lost in between is followed by one that finishes the sweep.
function ops.published(a)
  if not held(a) then return LOST end
  remember_peak(a)
  set(a.id, 'result', a.result, 'ending', 'succeeded', 'published', 1)
  redis.call('SET', sub(a.id, 'manifest'), a.manifest)
  return {}
end

-- The last word on a task that ends its job: publish, discard, or the plan of a plan request.
function ops.finish(a)
  if not held(a) then return LOST end
  drop_task(a.id, a.task)
  if a.result then set(a.id, 'result', a.result) end
  finalize(a.id, get(a.id, 'ending') or 'succeeded')
  return {}
end
