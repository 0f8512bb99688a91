package inbox

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/txbox/txbox/internal/failpoint"
)

// A verdict is what became of one transaction.
type verdict int

const (
	applied    verdict = iota // committed
	away                      // there was no transaction to be had; no handler ran
	again                     // rolled back, or of unknown outcome, through no fault of a handler
	failed                    // rolled back: a handler failed, or COMMIT
	ended                     // a handler ended the transaction; see ErrTxEnded
	stopped                   // rolled back: the consumer stops, or the delivery has lapsed
	contested                 // rolled back: others hold what it needs
	unprepared                // rolled back: Before was not called, since it seemed that no handler would be
)

// unit is what one transaction is about: messages that were delivered, or one that was
// parked.
type unit struct {
	items  []*item
	unpark *statement // opens the transaction of what was parked, and affects one row if it is ours
}

// item is a message that is to be handled.
type item struct {
	envelope
	attempt    int
	deliveries []*delivery     // more than one if it came more than once; none if it was parked
	contested  bool            // it was in a transaction that others were in the way of
	before     context.Context // what Config.Before returned, if it was called
	fate       fate
	unsure     bool // a transaction that it was in may have committed
}

// fate is what a transaction does with a message.
type fate int

const (
	handled fate = iota
	taken        // not ours: a duplicate, or another has the parked row
	blocked      // parked behind an earlier message of its key
)

// result is what became of a transaction.
type result struct {
	verdict
	err     error
	culprit int    // failed, ended: the index of the item whose handler did it; -1: nobody's
	xid     uint32 // of the transaction, as its rows bear it
	others  others // applied: what is known of IDs that were recorded before; nil: nothing
}

// apply runs a transaction until there is a verdict to act on. A database that is away is
// waited for; other failures that are not a handler's get maxRuns. It stops waiting when
// live ends.
func (c *Consumer) apply(ctx, live context.Context, u unit) result {
	wait := runBackOff()
	for run := 1; ; {
		r := c.run(ctx, u, run > 1)
		if errors.Is(r.err, ErrCommitUnknown) {
			u.unsure()
		}
		switch {
		case isContested(r.err) && len(u.items) > 1, isLocked(r.err) && u.waits(r.culprit):
			r.verdict, r.culprit = contested, -1
			return r
		case r.verdict == again && run == maxRuns:
			if !isOutage(r.err) {
				r.culprit = -1
			}
			r.verdict, r.err = failed, fmt.Errorf("in vain %d times: %w", maxRuns, r.err)
			return r
		case r.verdict == unprepared:
			if err := c.prepare(ctx, u.items[0]); err != nil {
				r.verdict, r.culprit, r.err = failed, 0, err
				if ctx.Err() != nil {
					r.verdict = stopped
				}
				return r
			}
			continue
		case r.verdict == again:
			run++
		case r.verdict != away:
			return r
		}
		if !sleep(live, wait.NextBackOff()) {
			r.verdict = stopped
			return r
		}
	}
}

// unsure notes that nobody knows whether a transaction with its effects has committed.
func (u unit) unsure() {
	for _, m := range u.items {
		m.unsure = m.unsure || m.fate == handled
	}
}

// waits reports whether a message that was alone, and met with a lock, waits for whoever
// holds it: for its ID without end, for what its handler needs once.
func (u unit) waits(culprit int) bool {
	return u.unpark == nil && (culprit < 0 || !u.items[0].contested)
}

// run runs a transaction once: the claim, the handlers, COMMIT.
func (c *Consumer) run(ctx context.Context, u unit, rerun bool) (r result) {
	r.culprit = -1
	callCtx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	tx, err := begin(callCtx, c.db, func(b *pgx.Batch) {
		if u.unpark != nil {
			c.claimParkedRow(b, u)
		} else {
			c.claim(b, u, &r.xid)
		}
	})
	c.reportDatabase(ctx, err)
	if err != nil {
		r.verdict, r.err = away, err
		return r
	}
	defer tx.end(ctx)
	failpoint.Hit("inbox/recorded")
	some, err := c.parkBlocked(callCtx, tx, u.items)
	if err != nil {
		r.verdict, r.err = again, err
		return r
	}
	g, asked := newGuard(ctx, tx), time.Now()
	for i, m := range u.items {
		if m.fate != handled {
			continue
		}
		if time.Since(asked) > callTimeout/2 {
			if err := c.ping(ctx, tx); err != nil {
				r.verdict, r.err = again, err
				return r
			}
			asked = time.Now()
		}
		if c.cfg.Before != nil && m.before == nil {
			r.verdict = unprepared
			return r
		}
		some, g.pipeline.at = true, i
		if r.verdict, r.err = c.call(ctx, g, m); r.verdict != applied {
			r.culprit = u.culprit(g, r.verdict)
			return r
		}
	}
	if !some {
		if u.unpark == nil {
			r.others = c.endTaken(callCtx, tx, u.items)
		}
		return r
	}
	failpoint.Hit("inbox/handled")
	r.verdict, r.err = c.finish(ctx, tx, g, rerun)
	if len(u.items) == 1 || g.pipeline.err != nil || r.verdict == ended {
		r.culprit = u.culprit(g, r.verdict)
	}
	return r
}

// finish sends what handlers have left in the pipeline and commits, in one round trip if it
// can: one that was run before takes two, which tell a statement that is too slow from a
// COMMIT of unknown outcome.
func (c *Consumer) finish(ctx context.Context, tx *transaction, g *guard, rerun bool) (verdict, error) {
	if rerun || !g.pipeline.isPlain() {
		if verdict, err := c.flush(ctx, g); verdict != applied {
			return verdict, err
		}
		commitCtx, cancel := context.WithTimeout(ctx, c.cfg.Timeout)
		defer cancel()
		err := tx.commit(commitCtx)
		if rerun && commitCtx.Err() != nil && ctx.Err() == nil && !c.silent(ctx) {
			return failed, fmt.Errorf("COMMIT not done after %s: %w", c.cfg.Timeout, err)
		}
		return judgeCommit(ctx, err)
	}
	verdict, err := c.judged(ctx, g, "a queued statement", g.flushAndCommit)
	switch sent := g.pipeline.err; {
	case tx.Conn().IsClosed() && !isUnsent(sent):
		return judgeCommit(ctx, fmt.Errorf("%w: %w", ErrCommitUnknown, err))
	case tx.isOver():
		return judgeCommit(ctx, commitError(sent))
	}
	return verdict, err
}

// endTaken ends a transaction that has nothing to do, and finds the others in the same round
// trip; nil if that fails.
func (c *Consumer) endTaken(ctx context.Context, tx pgx.Tx, items []*item) others {
	batch := &pgx.Batch{}
	found := c.compare(batch, items)
	batch.Queue("ROLLBACK")
	if tx.SendBatch(ctx, batch).Close() != nil {
		return nil
	}
	return found
}

// ping asks the server for nothing, lest it end a transaction in which handlers do not for
// longer than limits allow.
func (c *Consumer) ping(ctx context.Context, tx pgx.Tx) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	return tx.Conn().Ping(ctx)
}

// claimParkedRow queues the statements that tell whether a parked message is ours.
func (c *Consumer) claimParkedRow(b *pgx.Batch, u unit) {
	m := u.items[0]
	m.fate = taken
	b.Queue("SELECT "+limits("$1", "$2", "$3"), c.limits(u)...)
	b.Queue(u.unpark.sql, u.unpark.args...).Exec(func(tag pgconn.CommandTag) error {
		if tag.RowsAffected() == 1 {
			m.fate = handled
		}
		return nil
	})
}

// claim queues the statements that tell the fate of each message, and record those that
// are ours.
func (c *Consumer) claim(b *pgx.Batch, u unit, xid *uint32) {
	byID, byKey := make(map[string]*item, len(u.items)), make(map[string][]*item)
	ids, digests := make([]string, len(u.items)), make([]int64, len(u.items))
	for i, m := range u.items {
		m.fate, byID[m.id()] = taken, m
		ids[i], digests[i] = m.id(), m.digest()
		if key := m.storableKey(); key != nil {
			byKey[*key] = append(byKey[*key], m)
		}
	}
	args := []any{c.cfg.Name, ids, digests}
	if len(ids) == 1 {
		args = []any{c.cfg.Name, ids[0], digests[0]}
	}
	args = append(append(args, c.limits(u)...), milliseconds(u.handlerLockTimeout()))
	b.Queue(recordAllSQL(c.cfg.Schema, len(ids) == 1), args...).Query(func(rows pgx.Rows) error {
		var id string
		var txid int64
		_, err := pgx.ForEachRow(rows, []any{&id, &txid, nil}, func() error {
			byID[id].fate = handled
			*xid = uint32(txid)
			return nil
		})
		return err
	})
	if len(byKey) == 0 {
		return
	}
	keys := make([]string, 0, len(byKey))
	for key := range byKey {
		keys = append(keys, key)
	}
	args = []any{c.cfg.Name, keys}
	if len(keys) == 1 {
		args = []any{c.cfg.Name, keys[0]}
	}
	b.Queue(blockedSQL(c.cfg.Schema, len(keys) == 1), args...).Query(func(rows pgx.Rows) error {
		var key string
		_, err := pgx.ForEachRow(rows, []any{&key}, func() error {
			for _, m := range byKey[key] {
				if m.fate == handled {
					m.fate = blocked
				}
			}
			return nil
		})
		return err
	})
}

// parkBlocked parks those of the messages that were recorded and have to wait behind
// another, and reports whether there were any.
func (c *Consumer) parkBlocked(ctx context.Context, tx pgx.Tx, items []*item) (some bool, err error) {
	batch := &pgx.Batch{}
	for _, m := range items {
		if m.fate == blocked {
			batch.Queue(parkRecordedSQL(c.cfg.Schema), c.parkArgs(m.envelope, parking{reason: reasonBlocked, err: errBehind})...)
		}
	}
	if batch.Len() == 0 {
		return false, nil
	}
	return true, tx.SendBatch(ctx, batch).Close()
}

// judgeCommit judges what a COMMIT came to.
func judgeCommit(ctx context.Context, err error) (verdict, error) {
	switch {
	case err == nil:
		return applied, nil
	case isConflict(err), errors.Is(err, ErrCommitUnknown):
		return again, err
	case ctx.Err() != nil:
		return stopped, err
	}
	return failed, fmt.Errorf("commit: %w", err)
}

const (
	// lockTimeout is shorter than callTimeout, so that a twin that holds the ID costs
	// a statement and not a connection.
	lockTimeout = callTimeout / 2
	// A message waits less for an ID that another transaction holds: others can be handled
	// meanwhile. So does a batch for what its handlers need: two that wait for each other end
	// sooner than by PostgreSQL's deadlock_timeout, a second.
	shortLockTimeout = 200 * time.Millisecond
	// againLockTimeout is for what was waited for in vain before.
	againLockTimeout = 20 * time.Millisecond
)

// claimLockTimeout is how long the claim waits for an ID that another transaction holds.
func (u unit) claimLockTimeout() time.Duration {
	switch {
	case u.unpark != nil:
		return lockTimeout
	case slices.ContainsFunc(u.items, func(m *item) bool { return m.contested }):
		return againLockTimeout
	}
	return shortLockTimeout
}

// handlerLockTimeout is how long a handler waits for rows that another transaction holds.
func (u unit) handlerLockTimeout() time.Duration {
	if len(u.items) > 1 {
		return shortLockTimeout
	}
	return lockTimeout
}

// limits are the arguments of the SQL of that name.
func (c *Consumer) limits(u unit) []any {
	return []any{milliseconds(u.claimLockTimeout()), milliseconds(c.cfg.Timeout + callTimeout), milliseconds(callTimeout)}
}

func milliseconds(d time.Duration) string { return strconv.FormatInt(d.Milliseconds(), 10) }

// call calls the handler and judges what it did; applied is yet to be committed.
func (c *Consumer) call(ctx context.Context, g *guard, m *item) (verdict, error) {
	return c.judged(ctx, g, "the handler", func(handlerCtx context.Context) error {
		if m.before != nil {
			handlerCtx = handlerContext{handlerCtx, m.before}
		}
		g.pipeline.ctx = handlerCtx
		err := c.handler(handlerCtx, g, m.message(m.attempt))
		g.pipeline.settle()
		return err
	})
}

// flush sends what handlers have left in the pipeline, and judges that likewise.
func (c *Consumer) flush(ctx context.Context, g *guard) (verdict, error) {
	if g.pipeline.Len() == 0 {
		return applied, nil
	}
	return c.judged(ctx, g, "a queued statement", g.flush)
}

// judged calls a function of the user's for Config.Timeout at most.
func (c *Consumer) judged(ctx context.Context, g *guard, what string, fn func(context.Context) error) (verdict, error) {
	fnCtx, cancel := context.WithTimeout(ctx, c.cfg.Timeout)
	defer cancel()
	err := g.check(safely(what, func() error { return fn(fnCtx) }))
	late := fnCtx.Err() != nil
	switch {
	case err == nil:
		return applied, nil
	case errors.Is(err, ErrTxEnded):
		return ended, err
	case ctx.Err() != nil:
		return stopped, err
	case isDeliberate(err):
		return failed, err
	case isUnsent(err):
		return failed, err
	case isConflict(err), isOutage(err), g.Tx.Conn().IsClosed() && (!late || c.silent(ctx)):
		return again, err
	case late:
		return failed, fmt.Errorf("not done after %s: %w", c.cfg.Timeout, err)
	}
	return failed, err
}

// silent reports whether the database does not answer, so that a handler which waited for
// it too long is not to blame.
func (c *Consumer) silent(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	return c.db.Ping(ctx) != nil
}

// safely calls a function of the user's and makes an error of its panic. It does so in
// a goroutine that the function may end.
func safely(what string, fn func() error) error {
	result := make(chan error, 1)
	go func() {
		err := errors.New(what + " ended its goroutine, by runtime.Goexit or the FailNow of a test")
		defer func() {
			if reason := recover(); reason != nil {
				err = fmt.Errorf("panic: %v\n\n%s", reason, debug.Stack())
			}
			result <- err
		}()
		err = sound(fn())
	}()
	return <-result
}

// reportDatabase notes whether the database could be worked with. A lock or
// conflict is no news of the database, nor is the end of ctx.
func (c *Consumer) reportDatabase(ctx context.Context, err error) {
	switch {
	case err == nil:
		c.report(&c.database, nil)
	case !isContested(err) && ctx.Err() == nil:
		c.report(&c.database, &waiting{"the database", err})
	}
}
