-- How a job ends: first nothing of it runs any more, then staged work goes, then the state is final.

local ORDER = { none = 0, scratch = 1, all = 2 }
local REMEMBERED_MS = 8 * 86400 * 1000 -- scratch that nobody asks for goes after seven days

-- No longer one of those that may go on from what is staged. Whose disk still holds scratch of
-- something that nobody goes on from can ask for a while (`over`).
local function abandon(id, digest)
  redis.call('SREM', 'pissa:staging:' .. digest, id)
  if redis.call('EXISTS', 'pissa:staging:' .. digest) == 0 then
    redis.call('ZADD', 'pissa:over', now, digest)
    redis.call('ZREMRANGEBYSCORE', 'pissa:over', '-inf', now - REMEMBERED_MS)
  end
end

local function purge(id)
  local digest = get(id, 'digest')
  if digest then abandon(id, digest) end
  local idem = get(id, 'idem')
  if idem then redis.call('DEL', idem) end
  redis.call('DEL', J(id), sub(id, 'tasks'), sub(id, 'ready'), sub(id, 'held'),
    sub(id, 'events'), sub(id, 'rows'), sub(id, 'plan'), sub(id, 'manifest'))
end

local function unlist(id)
  redis.call('ZREM', 'pissa:jobs', id)
  redis.call('ZREM', 'pissa:jobs:' .. get(id, 'owner'), id)
  redis.call('ZREM', 'pissa:finished', id)
  redis.call('HINCRBY', 'pissa:counts', get(id, 'status'), -1)
end

-- Give up the claim on what is staged: whoever still has one may throw it away.
local function forget_staging(id)
  local digest = get(id, 'digest')
  if not digest then return end
  abandon(id, digest)
  redis.call('HDEL', J(id), 'digest')
end

local function count_failure(id)
  local error = get(id, 'error')
  local what = get(id, 'kind') == 'plan' and 'plan_failed:' or 'failed:'
  count(what .. (error and cjson.decode(error).code or 'internal'))
end

local function finalize(id, outcome)
  for _, t in ipairs(redis.call('HKEYS', sub(id, 'tasks'))) do unhook(id, t) end
  redis.call('DEL', sub(id, 'tasks'), sub(id, 'ready'), sub(id, 'held'))
  -- The token is of no use to an ended job; nothing secret outlives the work.
  redis.call('HDEL', J(id), 'token', 'ending', 'published')
  if outcome == 'succeeded' or get(id, 'discard') == 'all' then forget_staging(id) end
  redis.call('HDEL', J(id), 'discard')
  if outcome == 'deleted' then return purge(id) end
  set_phase(id, 'done')
  set_status(id, outcome)
  set(id, 'finished', now)
  if get(id, 'kind') ~= 'plan' then redis.call('ZADD', 'pissa:finished', now, id) end
  if outcome == 'failed' then count_failure(id) end
  if outcome == 'succeeded' then
    redis.call('HDEL', J(id), 'error')
    redis.call('DEL', sub(id, 'rows'))
  end
  emit_json(id, outcome, outcome == 'failed' and get(id, 'error') or '{}')
  if get(id, 'kind') == 'plan' then
    for _, key in ipairs({ J(id), sub(id, 'events') }) do redis.call('EXPIRE', key, 600) end
  end
end

-- Staged work that another job may go on from is not this job's to throw away.
local function discards(id)
  local mode, digest = get(id, 'discard') or 'none', get(id, 'digest')
  if mode == 'none' or not digest then return false end
  local others = redis.call('SCARD', 'pissa:staging:' .. digest)
    - redis.call('SISMEMBER', 'pissa:staging:' .. digest, id)
  return others == 0
end

local function maybe_end(id)
  local ending = get(id, 'ending')
  if not ending or redis.call('SCARD', sub(id, 'held')) > 0 then return end
  if get_task(id, 'discard') then return end
  if discards(id) then
    make_ready(id, 'discard', new_task())
  else
    finalize(id, ending)
  end
end

local function begin_end(id, outcome, discard)
  set(id, 'ending', outcome)
  if ORDER[discard] >= ORDER[get(id, 'discard') or 'none'] then set(id, 'discard', discard) end
  for _, t in ipairs(redis.call('HKEYS', sub(id, 'tasks'))) do
    if redis.call('SISMEMBER', sub(id, 'held'), t) == 0 then drop_task(id, t) end
  end
  maybe_end(id)
end

local function fail_job(id, error, discard)
  set(id, 'error', error)
  begin_end(id, 'failed', discard)
end

-- A worker died, or fell silent, while it held the task. A known cause outlives losses without one.
local function lose(id, t, task, a)
  task.lost = task.lost + 1
  count('lost:' .. a.code)
  if a.code ~= 'worker_lost' then task.cause = a.error end
  drop_task(id, t)
  local ending = get(id, 'ending')
  if ending and not get(id, 'published') then
    if t == 'discard' and task.lost < a.max_losses then
      make_ready(id, t, task)
    elseif t == 'discard' then
      finalize(id, ending)
    else
      maybe_end(id)
    end
  elseif task.lost >= a.max_losses and ending then
    finalize(id, ending)
  elseif task.lost >= a.max_losses then
    fail_job(id, task.cause or a.exhausted, 'none')
  else
    make_ready(id, t, task)
    if redis.call('SCARD', sub(id, 'held')) == 0 then set_phase(id, 'waiting') end
    emit_wait(id, { task = t, code = a.code, delay_s = 0 })
  end
end
