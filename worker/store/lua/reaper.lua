-- What goes round every few seconds, in one process at a time.

-- After a pause of the store (or of everything) nobody could renew: leases get time to be renewed.
function ops.round(a)
  if not redis.call('SET', 'pissa:reaper', a.by, 'NX', 'PX', a.period_ms) then return { busy = true } end
  local last = tonumber(redis.call('GET', 'pissa:reaper:last') or '0')
  redis.call('SET', 'pissa:reaper:last', now)
  if last > 0 and now - last > a.pause_ms then
    for _, m in ipairs(redis.call('ZRANGEBYSCORE', 'pissa:leases', '-inf', now + a.grace_ms)) do
      redis.call('ZADD', 'pissa:leases', now + a.grace_ms, m)
    end
  end
  local due = redis.call('ZRANGEBYSCORE', 'pissa:delayed', '-inf', now, 'LIMIT', 0, 1000)
  for _, m in ipairs(due) do
    local id, t = string.match(m, '^(.-)|(.*)$')
    redis.call('ZREM', 'pissa:delayed', m)
    local task = get_task(id, t)
    if task then make_ready(id, t, task) end
  end
  for _, queue in ipairs(redis.call('SMEMBERS', 'pissa:queues')) do touched[queue] = true end
  return {}
end

function ops.leases(a)
  local out = {}
  local all = redis.call('ZRANGE', 'pissa:leases', 0, -1, 'WITHSCORES')
  for i = 1, #all, 2 do
    local id, t = string.match(all[i], '^(.-)|(.*)$')
    local task = get_task(id, t)
    if not task or task.state ~= 'leased' then
      redis.call('ZREM', 'pissa:leases', all[i])
    else
      out[#out + 1] = { id = id, task = t, token = task.token, holder = task.holder,
        worker = task.worker, expired = tonumber(all[i + 1]) <= now }
    end
  end
  return { leases = out }
end

-- Tasks whose message was sent a while ago and that no worker has taken up.
function ops.overdue(a)
  local out = {}
  for _, queue in ipairs(redis.call('SMEMBERS', 'pissa:queues')) do
    local served = tonumber(redis.call('HGET', 'pissa:served', queue) or '0')
    local late = redis.call('ZRANGEBYSCORE', 'pissa:sent:' .. queue, '-inf', now - a.resend_ms)
    for _, m in ipairs(late) do
      local id, t = string.match(m, '^(.-)|(.*)$')
      local task = get_task(id, t)
      if not task or task.state ~= 'sent' then
        redis.call('ZREM', 'pissa:sent:' .. queue, m)
        touched[queue] = true
      elseif get(id, 'kind') == 'plan' and now - task.since > a.plan_ms then
        fail_job(id, a.error, 'none')
      else
        out[#out + 1] = { id = id, task = t, queue = queue, waited_ms = now - math.max(task.since, served) }
      end
    end
  end
  return { overdue = out }
end

function ops.resent(a)
  redis.call('ZADD', 'pissa:sent:' .. a.queue, 'XX', now, member(a.id, a.task))
  return {}
end

-- Nobody shares the storage that a sent task needs: its job cannot be served.
function ops.unserved(a)
  local task = get_task(a.id, a.task)
  if not task or task.state ~= 'sent' then return {} end
  drop_task(a.id, a.task)
  local ending = get(a.id, 'ending')
  if ending then finalize(a.id, ending) else fail_job(a.id, a.error, 'none') end
  return {}
end

-- Of some digests, those whose scratch nobody takes up any more: every job that worked under them
-- has succeeded, was cancelled, or is gone. What this store never knew is not among them.
function ops.over(a)
  local out = {}
  for _, digest in ipairs(a.digests) do
    local jobs = redis.call('SMEMBERS', 'pissa:staging:' .. digest)
    local over = #jobs > 0 or redis.call('ZSCORE', 'pissa:over', digest)
    for _, id in ipairs(jobs) do over = over and get(id, 'status') == 'cancelled' end
    if over then out[#out + 1] = digest end
  end
  return { over = out }
end

function ops.beat(a)
  redis.call('HSET', 'pissa:workers', a.name, a.record)
  redis.call('ZADD', 'pissa:workers:seen', now, a.name)
  return {}
end

function ops.leave(a)
  redis.call('HDEL', 'pissa:workers', a.name)
  redis.call('ZREM', 'pissa:workers:seen', a.name)
  redis.call('HDEL', 'pissa:workers:peak', a.name)
  redis.call('SREM', 'pissa:draining', a.name)
  return {}
end

function ops.drain(a)
  redis.call('SADD', 'pissa:draining', a.name)
  return {}
end

function ops.workers(a)
  local out = {}
  local seen = redis.call('ZRANGE', 'pissa:workers:seen', 0, -1, 'WITHSCORES')
  for i = 1, #seen, 2 do
    local record = redis.call('HGET', 'pissa:workers', seen[i])
    if record then out[#out + 1] = { record = record, name = seen[i], ago_ms = now - seen[i + 1] } end
  end
  return { workers = out }
end

-- How many messages may wait in each queue: a few more than there are workers to take them. Also
-- when a queue was last served: what waits behind a worker that is started anew is not unserved.
function ops.windows(a)
  for queue, size in pairs(a.windows) do
    redis.call('HSET', 'pissa:windows', queue, size)
    redis.call('HSET', 'pissa:served', queue, now)
  end
  return {}
end

function ops.ready(a)
  redis.call('SET', 'pissa:ready', now)
  return {}
end

-- Everything the metrics tell, at one moment; none of it takes longer with more jobs.
function ops.figures(a)
  local oldest = redis.call('ZRANGE', 'pissa:waiting', 0, 0, 'WITHSCORES')
  local sent = 0
  for _, queue in ipairs(redis.call('SMEMBERS', 'pissa:queues')) do
    sent = sent + redis.call('ZCARD', 'pissa:sent:' .. queue)
  end
  return {
    jobs = redis.call('HGETALL', 'pissa:counts'),
    totals = redis.call('HGETALL', 'pissa:totals'),
    peaks = redis.call('HGETALL', 'pissa:workers:peak'),
    queue_age_ms = oldest[2] and math.max(now - tonumber(oldest[2]), 0) or 0,
    tasks = { sent = sent, leased = redis.call('ZCARD', 'pissa:leases'),
      delayed = redis.call('ZCARD', 'pissa:delayed') },
  }
end
