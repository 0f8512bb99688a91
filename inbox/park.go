package inbox

import (
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
)

// Reasons why a message is parked, as in the table.
const (
	reasonRetry     = "retry"
	reasonBlocked   = "blocked"
	reasonDead      = "dead"
	reasonMissingID = "missing_id"
	reasonBadID     = "bad_id"
)

const (
	firstRetry, lastRetry = time.Second, time.Minute // limits of the back-off
	maxLastError          = 4 << 10                  // bytes
)

// errBehind is what a blocked message is parked with.
var errBehind = errors.New("an earlier message of its key is parked")

// fate decides what becomes of a message after err failed its attempt: the reason
// it is parked for, the attempts it has spent, and when the next one is due.
func (c *Consumer) fate(err error, attempts int) (reason string, spent int, delay time.Duration) {
	rejected, postponed := (*rejection)(nil), (*postponement)(nil)
	switch {
	case errors.As(err, &rejected), errors.Is(err, ErrTxEnded):
		return reasonDead, attempts, 0
	case errors.As(err, &postponed):
		return reasonRetry, attempts - 1, postponed.delay
	case attempts >= c.cfg.MaxAttempts:
		return reasonDead, attempts, 0
	}
	limit := min(firstRetry<<min(max(attempts-1, 0), 16), lastRetry)
	return reasonRetry, attempts, rand.N(limit)
}

// isDeliberate reports whether err is from Reject or RetryAfter.
func isDeliberate(err error) bool {
	rejected, postponed := (*rejection)(nil), (*postponement)(nil)
	return errors.As(err, &rejected) || errors.As(err, &postponed)
}

// park puts a delivered message aside after its handler failed, or behind an
// earlier one of its key, and reports whether it is on record.
func (c *Consumer) park(live context.Context, e envelope, v verdict, err error) bool {
	reason, attempts, delay := reasonBlocked, 0, time.Duration(0)
	if v != blocked {
		c.count(func(s *Stats) { s.Failures++ })
		reason, attempts, delay = c.fate(err, 1)
		c.sayFailure(e.id(), reason, 1, err)
	}
	rows, ok := c.persist(live, c.parkStatement(e, v, reason, attempts, delay, err))
	switch {
	case !ok:
		return false
	case rows == 0: // a twin was applied or parked
		c.count(func(s *Stats) { s.Duplicates++ })
	default:
		c.parked(reason)
	}
	if v == blocked { // behind what may be gone by now
		c.unblock(live, e)
	}
	return true
}

// sayFailure logs that a message is parked after its attempt failed, or for lack of
// a usable ID. What it leaves out stands in inbox_parked.
func (c *Consumer) sayFailure(id, reason string, attempt int, err error) {
	said := &c.deadSaid // waits for a human
	if reason == reasonRetry {
		said = &c.retrySaid
	}
	unsaid, ok := said.allow()
	if !ok {
		return
	}
	text, _, _ := strings.Cut(lastError(err), "\n")
	c.log.Warn("inbox: a message is parked", "message_id", id, "reason", reason, "attempt", attempt,
		"of", c.cfg.MaxAttempts, "error", text, "more", unsaid)
}

// rarely lets something be said once in sayEvery.
type rarely struct {
	mu     sync.Mutex
	last   time.Time
	unsaid int // since then
}

const sayEvery = 10 * time.Second

func (r *rarely) allow() (unsaid int, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if time.Since(r.last) < sayEvery {
		r.unsaid++
		return 0, false
	}
	unsaid = r.unsaid
	r.last, r.unsaid = time.Now(), 0
	return unsaid, true
}

// parkStatement parks a message; after the handler ended the transaction, without
// asking whether it is recorded, since nobody knows what else was committed.
func (c *Consumer) parkStatement(e envelope, v verdict, reason string, attempts int, delay time.Duration, err error) statement {
	sql := parkSQL(c.cfg.Schema)
	if v == ended {
		sql = parkEndedSQL(c.cfg.Schema)
	}
	return statement{sql, []any{
		c.cfg.Name, e.id(), e.digest(), e.storableKey(), reason, delay.Seconds(), attempts, lastError(err),
		pack(e.properties), pack(e.headers), e.body,
	}}
}

// parkUnusable parks a message that has no ID to record it by.
func (c *Consumer) parkUnusable(live context.Context, e envelope, err error) bool {
	reason := reasonBadID
	if e.id() == "" {
		reason = reasonMissingID
	}
	rows, ok := c.persist(live, statement{parkUnusableSQL(c.cfg.Schema), []any{
		c.cfg.Name, reason, e.digestOfAll(), lastError(err), pack(e.properties), pack(e.headers), e.body,
	}})
	if ok && rows > 0 {
		c.sayFailure(e.id(), reason, 0, err)
		c.parked(reason)
	}
	return ok
}

// unblock makes the next parked message of e's key due after an earlier one is
// gone. If that fails, watchDue finds it.
func (c *Consumer) unblock(live context.Context, e envelope) {
	key := e.storableKey()
	if key == nil {
		return
	}
	ctx, cancel := context.WithTimeout(live, callTimeout)
	defer cancel()
	tag, err := c.db.Exec(ctx, unblockSQL(c.cfg.Schema), c.cfg.Name, *key)
	c.reportDatabase(live, err)
	if tag.RowsAffected() > 0 {
		c.wakeUp()
	}
}

// parked counts a message that was parked.
func (c *Consumer) parked(reason string) {
	c.count(func(s *Stats) { s.Parked[reason]++ })
	c.wakeUp()
}

// wakeUp has watchDue look at once.
func (c *Consumer) wakeUp() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// lastError is err as text that PostgreSQL takes.
func lastError(err error) string {
	text := strings.ReplaceAll(err.Error(), "\x00", "\uFFFD")
	return strings.ToValidUTF8(text[:min(len(text), maxLastError)], "")
}

// persist executes s until that succeeds or live ends, and once in any case.
func (c *Consumer) persist(live context.Context, s statement) (rows int64, ok bool) {
	wait := runBackOff()
	for {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(live), callTimeout)
		tag, err := c.db.Exec(ctx, s.sql, s.args...)
		cancel()
		c.reportDatabase(live, err)
		if err == nil {
			return tag.RowsAffected(), true
		}
		if !sleep(live, wait.NextBackOff()) {
			return 0, false
		}
	}
}

const (
	duePage  = 100
	dueSoon  = 500 * time.Millisecond // between looks, while something is parked for retry
	dueIdle  = 5 * time.Second        // while nothing is
	dueAgain = 10 * time.Millisecond  // while there is more than a page
	// Keys in one look for blocked messages with nothing before them: an operator
	// has dealt with it, or a process has died before it came to unblock.
	unblockPage = 1000
)

// watchDue looks for parked messages that are due and gives them to the workers,
// until ctx ends.
func (c *Consumer) watchDue(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	unblock := time.NewTicker(dueIdle)
	defer unblock.Stop()
	for key := ""; ; {
		select {
		case <-timer.C:
		case <-c.wake:
		case <-unblock.C:
			key = c.unblockAll(ctx, key)
		case <-ctx.Done():
			return
		}
		ids, waiting, err := c.listDue(ctx)
		for _, id := range ids {
			select {
			case c.due <- id:
			case <-ctx.Done():
				return
			}
		}
		switch {
		case len(ids) == duePage:
			timer.Reset(dueAgain)
		case waiting && err == nil:
			timer.Reset(dueSoon)
		default:
			timer.Reset(dueIdle/2 + rand.N(dueIdle/2))
		}
	}
}

// listDue returns the parked messages that are due, up to a page, and whether
// any are waiting, due or not. It also notices that an idle consumer's database is
// away or back.
func (c *Consumer) listDue(ctx context.Context) (ids []int64, waiting bool, err error) {
	callCtx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	defer func() { c.reportDatabase(ctx, err) }()
	rows, err := c.db.Query(callCtx, dueSQL(c.cfg.Schema), c.cfg.Name, duePage)
	if err != nil {
		return nil, false, err
	}
	var id int64
	var due bool
	_, err = pgx.ForEachRow(rows, []any{&id, &due}, func() error {
		waiting = true
		if due {
			ids = append(ids, id)
		}
		return nil
	})
	return ids, waiting, err
}

// unblockAll makes due what waits behind nothing, among the next keys after key,
// and returns where to go on.
func (c *Consumer) unblockAll(ctx context.Context, key string) (next string) {
	callCtx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	err := c.db.QueryRow(callCtx, unblockAllSQL(c.cfg.Schema), c.cfg.Name, key, unblockPage).Scan(&next)
	c.reportDatabase(ctx, err)
	return next
}

// parkedMessage is a parked message whose next attempt is this worker's to make.
type parkedMessage struct {
	envelope
	id       int64
	token    int // attempts in the row: tells this attempt from a later one
	attempts int // made, with this one
}

// handleAgain makes one more attempt at a parked message that was due.
func (c *Consumer) handleAgain(live, ctx context.Context, id int64) {
	if live.Err() != nil {
		return
	}
	p, err := c.claim(ctx, id)
	switch {
	case p == nil: // another was faster, or the database is away; it is listed again
		return
	case err != nil:
		c.settle(live, p, failed, Reject(err))
		return
	case p.attempts > c.cfg.MaxAttempts:
		p.attempts-- // it is not made
		c.settle(live, p, failed, Reject(errors.New("the last attempt did not come to an end: did the process die?")))
		return
	}
	unpark := []statement{{unparkSQL(c.cfg.Schema), []any{p.id, p.token}}}
	v, err := c.apply(ctx, live, unpark, p.envelope, p.attempts)
	switch v {
	case applied:
		c.count(func(s *Stats) { s.Applied++ })
		c.unblock(ctx, p.envelope)
	case failed, ended, stopped:
		c.settle(live, p, v, err)
	}
}

// claim counts the attempt before it is made, so that a message which kills the
// process does not do so for ever, and puts the row off until it must be over.
// It returns nil if the row is not to be had.
func (c *Consumer) claim(ctx context.Context, id int64) (*parkedMessage, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	p := &parkedMessage{id: id}
	var properties, headers []byte
	over := c.cfg.Timeout + 3*callTimeout
	err := c.db.QueryRow(ctx, claimSQL(c.cfg.Schema), id, over.Seconds()).Scan(&p.token, &properties, &headers, &p.body)
	if err != nil {
		return nil, err
	}
	p.attempts = p.token
	if p.properties, err = unpack(properties); err != nil {
		return p, err
	}
	p.headers, err = unpack(headers)
	return p, err
}

// settle ends a claimed attempt that did not apply the message. If the row is not
// there any more, somebody else has settled it.
func (c *Consumer) settle(live context.Context, p *parkedMessage, v verdict, err error) {
	reason, attempts, delay := c.fate(err, p.attempts)
	if v == stopped { // no attempt after all
		reason, attempts, delay = reasonRetry, p.attempts-1, 0
	} else {
		c.count(func(s *Stats) { s.Failures++ })
		c.sayFailure(p.envelope.id(), reason, p.attempts, err)
	}
	s := statement{settleSQL(c.cfg.Schema), []any{p.id, p.token, reason, attempts, lastError(err), delay.Seconds()}}
	if v == ended {
		s = c.parkStatement(p.envelope, v, reason, attempts, delay, err)
	}
	if rows, ok := c.persist(live, s); ok && rows > 0 && v != stopped {
		c.parked(reason)
	}
}
