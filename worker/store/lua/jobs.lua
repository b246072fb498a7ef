-- What the API asks for: submit, cancel, resume, delete.

local function start_over(id)
  redis.call('DEL', sub(id, 'rows'), sub(id, 'plan'))
  for _, field in ipairs({ 'matrices', 'shards', 'bytes' }) do
    set(id, field .. '_done', 0, field .. '_total', 0)
  end
  redis.call('HDEL', J(id), 'bytes_resumed', 'shards_at')
end

function ops.submit(a)
  if redis.call('EXISTS', J(a.id)) == 1 then return { id = a.id, created = true } end
  if a.idem then
    local known = redis.call('HMGET', a.idem, 'id', 'digest')
    if known[1] then
      return { id = known[1], created = false, mismatch = known[2] ~= a.body_digest }
    end
  end
  if a.max_queued then
    local queued = tonumber(redis.call('HGET', 'pissa:queued', a.owner) or '0')
    if queued >= a.max_queued then return { full = queued } end
  end
  if a.idem then
    redis.call('HSET', a.idem, 'id', a.id, 'digest', a.body_digest)
    set(a.id, 'idem', a.idem)
  end
  local seq = redis.call('INCR', 'pissa:seq')
  set(a.id, 'kind', a.kind, 'owner', a.owner, 'request', a.request, 'created', now,
    'phase', 'queued', 'phase_at', now, 'attempts', 0, 'seq', seq,
    'plan_queue', a.plan_queue, 'work_queue', a.work_queue)
  if a.token then set(a.id, 'token', a.token) end
  if a.request_id then set(a.id, 'request_id', a.request_id) end
  set_status(a.id, 'queued')
  count('submitted:' .. a.kind)
  if a.kind == 'plan' then
    make_ready(a.id, 'plan', new_task())
  else
    redis.call('ZADD', 'pissa:jobs', seq, a.id)
    redis.call('ZADD', 'pissa:jobs:' .. a.owner, seq, a.id)
    emit(a.id, 'queued', { kind = a.kind })
    make_ready(a.id, 'prepare', new_task())
  end
  return { id = a.id, created = true }
end

function ops.cancel(a)
  local status = get(a.id, 'status')
  if not status or get(a.id, 'hidden') then return { missing = true } end
  if status == 'cancelled' then
    -- Asked again, it may still throw away what the first time kept for a resume.
    if a.discard then set(a.id, 'discard', 'all') end
    if not discards(a.id) then
      redis.call('HDEL', J(a.id), 'discard')
      if a.discard then forget_staging(a.id) end
      return {}
    end
  elseif status == 'succeeded' or status == 'failed' then
    return { conflict = status }
  elseif get(a.id, 'published') then
    return { conflict = 'published' }
  end
  if status == 'cancelling' or get(a.id, 'ending') then
    if a.discard and not get_task(a.id, 'discard') then set(a.id, 'discard', 'all') end
    return {}
  end
  set_status(a.id, 'cancelling')
  emit(a.id, 'cancelling', { discard = a.discard or false })
  begin_end(a.id, 'cancelled', a.discard and 'all' or 'scratch')
  return {}
end

function ops.resume(a)
  local status = get(a.id, 'status')
  if not status or get(a.id, 'hidden') then return { missing = true } end
  if get(a.id, 'resumed_by') == a.nonce then return {} end
  if status ~= 'failed' and status ~= 'cancelled' then return { conflict = status } end
  for _, field in ipairs(redis.call('HKEYS', J(a.id))) do
    if string.sub(field, 1, 3) == 'ms:' then redis.call('HDEL', J(a.id), field) end
  end
  redis.call('HDEL', J(a.id), 'error', 'result', 'finished', 'started', 'token', 'peak',
    'restarts', 'discard')
  set(a.id, 'resumed_by', a.nonce, 'plan_queue', a.plan_queue, 'work_queue', a.work_queue)
  if a.token then set(a.id, 'token', a.token) end
  if a.request_id then set(a.id, 'request_id', a.request_id) end
  start_over(a.id)
  redis.call('ZREM', 'pissa:finished', a.id)
  set_status(a.id, 'queued')
  set_phase(a.id, 'queued')
  redis.call('HDEL', J(a.id), 'ms:done')
  emit(a.id, 'resumed', {})
  make_ready(a.id, 'prepare', new_task())
  return {}
end

-- Jobs that ended before a time, oldest first; what is left is for the next round.
function ops.finished_before(a)
  local ids = redis.call('ZRANGEBYSCORE', 'pissa:finished', '-inf', now - a.age_ms, 'LIMIT', 0, 100)
  return { ids = ids }
end

function ops.delete(a)
  local status = get(a.id, 'status')
  if not status or get(a.id, 'hidden') then return { missing = true } end
  if not FINAL[status] then return { conflict = status } end
  unlist(a.id)
  local idem = get(a.id, 'idem')
  if idem then redis.call('DEL', idem) end
  set(a.id, 'hidden', 1)
  -- A job that succeeded has discarded its staging itself.
  begin_end(a.id, 'deleted', status == 'succeeded' and 'none' or 'all')
  return {}
end
