package inbox

import (
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/txbox/txbox/internal/failpoint"
	"github.com/txbox/txbox/internal/wire"
)

// Reasons why a message is parked, as in the table. The first three are of messages that
// are recorded.
const (
	reasonRetry     = "retry"
	reasonBlocked   = "blocked"
	reasonDead      = "dead"
	reasonMissingID = "missing_id"
	reasonBadID     = "bad_id"
	reasonConflict  = "id_conflict"
	reasonTooOld    = "too_old"
)

const (
	firstRetry, lastRetry = time.Second, time.Minute // limits of the back-off
	outageRetry           = 10 * time.Second         // while a server lacks something
	maxLastError          = 4 << 10                  // bytes
)

// errBehind is what a blocked message is parked with.
var errBehind = errors.New("an earlier message of its key is parked")

// parking is how a recorded message is parked.
type parking struct {
	reason   string
	attempts int // spent
	delay    time.Duration
	err      error
}

// judge decides what becomes of a message after err failed its attempt.
func (c *Consumer) judge(err error, attempts int) parking {
	rejected, postponed := (*rejection)(nil), (*postponement)(nil)
	switch {
	case errors.As(err, &rejected), errors.Is(err, ErrTxEnded):
		return parking{reasonDead, attempts, 0, err}
	case errors.As(err, &postponed):
		return parking{reasonRetry, attempts - 1, postponed.delay, err}
	case isOutage(err):
		return parking{reasonRetry, attempts - 1, rand.N(outageRetry), err}
	case attempts >= c.cfg.MaxAttempts:
		return parking{reasonDead, attempts, 0, err}
	}
	limit := min(firstRetry<<min(max(attempts-1, 0), 16), lastRetry)
	return parking{reasonRetry, attempts, rand.N(limit), err}
}

// isDeliberate reports whether err is from Reject or RetryAfter.
func isDeliberate(err error) bool {
	rejected, postponed := (*rejection)(nil), (*postponement)(nil)
	return errors.As(err, &rejected) || errors.As(err, &postponed)
}

// failed parks a delivered message after its attempt failed. If the handler ended the
// transaction nobody knows whether it is recorded.
func (c *Consumer) failed(live context.Context, m *item, ended bool, err error) {
	c.count(func(s *Stats) { s.Failures++ })
	p := c.judge(err, 1)
	c.sayFailure(m.id(), p.reason, 1, err)
	c.park(live, m, ended, p)
}

// park records and parks a delivered message, and acknowledges it.
func (c *Consumer) park(live context.Context, m *item, ended bool, p parking) {
	sql := parkSQL(c.cfg.Schema)
	if ended {
		sql = parkEndedSQL(c.cfg.Schema)
	}
	failpoint.Hit("inbox/park")
	rows, ok := c.persist(live, statement{sql, c.parkArgs(m.envelope, p)})
	failpoint.Hit("inbox/parked")
	if !ok {
		return
	}
	if rows > 0 {
		c.parked(p.reason)
		acknowledge(m)
		return
	}
	switch others, ok := c.othersWithID(live, []*item{m}); { // a twin was applied or parked, or another message
	case !ok:
	case others[m.id()]:
		c.parkUnowned(m, reasonConflict, errConflict)
	default:
		c.count(func(s *Stats) {
			if m.unsure {
				s.Applied++
			} else {
				s.Duplicates++
			}
		})
		acknowledge(m)
	}
}

// sayFailure logs that a message is parked after its attempt failed, or for lack of
// a usable ID. What it leaves out stands in inbox_parked.
func (c *Consumer) sayFailure(id, reason string, attempt int, err error) {
	postponed := (*postponement)(nil)
	said := c.said[reason]
	if errors.As(err, &postponed) {
		said = c.said[postponedLines]
	}
	unsaid, ok := said.allow()
	if !ok {
		return
	}
	text, _, _ := strings.Cut(lastError(err), "\n")
	c.log.Warn("inbox: a message is parked", "message_id", id, "reason", reason, "attempt", attempt,
		"of", c.cfg.MaxAttempts, "error", text, "without_a_line", unsaid)
}

// lines bounds the lines that are logged of something: maxLines in linesEvery.
type lines struct {
	mu           sync.Mutex
	since        time.Time // when said began to count
	said, unsaid int
}

const (
	maxLines   = 20
	linesEvery = 10 * time.Second
	// postponedLines are those of messages that asked for more time.
	postponedLines = "postponed"
)

func newLines() map[string]*lines {
	all := make(map[string]*lines)
	for _, of := range []string{reasonRetry, postponedLines, reasonDead, reasonMissingID, reasonBadID, reasonConflict, reasonTooOld} {
		all[of] = &lines{}
	}
	return all
}

// allow says whether a line may be written, and after how many that were not.
func (l *lines) allow() (unsaid int, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if time.Since(l.since) > linesEvery {
		l.since, l.said = time.Now(), 0
	}
	if l.said++; l.said > maxLines {
		l.unsaid++
		return 0, false
	}
	unsaid, l.unsaid = l.unsaid, 0
	return unsaid, true
}

func (c *Consumer) parkArgs(e envelope, p parking) []any {
	return []any{
		c.cfg.Name, e.id(), e.digest(), e.storableKey(), p.reason, p.delay.Seconds(), p.attempts, lastError(p.err),
		pack(e.properties), pack(e.headers), e.body,
	}
}

// parkUnowned parks a delivered message of which there is no record, and acknowledges it.
func (c *Consumer) parkUnowned(m *item, reason string, err error) {
	live := m.deliveries[0].live
	var id *string
	if m.id() != "" && wire.CheckText(m.id()) == nil {
		text := m.id()
		id = &text
	}
	rows, ok := c.persist(live, statement{parkUnownedSQL(c.cfg.Schema), []any{
		c.cfg.Name, id, reason, m.digestOfAll(), lastError(err), pack(m.properties), pack(m.headers), m.body,
	}})
	if !ok {
		return
	}
	if rows > 0 {
		c.sayFailure(m.id(), reason, 0, err)
		c.parked(reason)
	}
	acknowledge(m)
}

// unblock makes the next parked message of e's key due after an earlier one is
// gone, if it is not, and has watchDue look for it. If that fails, watchDue finds it later.
func (c *Consumer) unblock(live context.Context, e envelope) {
	key := e.storableKey()
	if key == nil {
		return
	}
	ctx, cancel := context.WithTimeout(live, callTimeout)
	defer cancel()
	_, err := c.db.Exec(ctx, unblockSQL(c.cfg.Schema), unplanned, c.cfg.Name, *key)
	c.reportDatabase(live, err)
	c.wakeUp()
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
	ok = c.persevere(live, func(ctx context.Context) error {
		tag, err := c.db.Exec(ctx, s.sql, append([]any{unplanned}, s.args...)...)
		rows = tag.RowsAffected()
		return err
	})
	return rows, ok
}

// persevere calls do, for callTimeout at most, until that succeeds or live ends, and once
// in any case.
func (c *Consumer) persevere(live context.Context, do func(context.Context) error) bool {
	wait := runBackOff()
	for {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(live), callTimeout)
		err := do(ctx)
		cancel()
		c.reportDatabase(live, err)
		if err == nil {
			return true
		}
		if !sleep(live, wait.NextBackOff()) {
			return false
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
		due, waiting, err := c.listDue(ctx)
		for _, row := range due {
			select {
			case c.due <- row:
			case <-ctx.Done():
				return
			}
		}
		switch {
		case len(due) == duePage:
			timer.Reset(dueAgain)
		case waiting && err == nil:
			timer.Reset(dueSoon)
		default:
			timer.Reset(dueIdle/2 + rand.N(dueIdle/2))
		}
	}
}

// dueRow is a parked message that was due, and the attempts that had been made then.
type dueRow struct {
	id       int64
	attempts int
}

// listDue returns the parked messages that are due, up to a page, and whether
// any are waiting, due or not. It also notices that an idle consumer's database is
// away or back.
func (c *Consumer) listDue(ctx context.Context) (all []dueRow, waiting bool, err error) {
	callCtx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	defer func() { c.reportDatabase(ctx, err) }()
	rows, err := c.db.Query(callCtx, dueSQL(c.cfg.Schema), unplanned, c.cfg.Name, duePage)
	if err != nil {
		return nil, false, err
	}
	var row dueRow
	var due bool
	_, err = pgx.ForEachRow(rows, []any{&row.id, &row.attempts, &due}, func() error {
		waiting = true
		if due {
			all = append(all, row)
		}
		return nil
	})
	return all, waiting, err
}

// unblockAll makes due what waits behind nothing, among the next keys after key,
// and returns where to go on.
func (c *Consumer) unblockAll(ctx context.Context, key string) (next string) {
	callCtx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	err := c.db.QueryRow(callCtx, unblockAllSQL(c.cfg.Schema), unplanned, c.cfg.Name, key, unblockPage).Scan(&next)
	c.reportDatabase(ctx, err)
	return next
}

// parkedMessage is a parked message whose next attempt is this worker's to make.
type parkedMessage struct {
	item        // attempt counts this one
	id    int64 // of the row
	token int   // attempts in the row: tells this attempt from a later one
}

// handleAgain makes one more attempt at a parked message that was due.
func (c *Consumer) handleAgain(live, ctx context.Context, row dueRow) {
	if live.Err() != nil {
		return
	}
	p, err := c.claimParked(ctx, row)
	switch {
	case errors.Is(err, pgx.ErrNoRows): // another was faster
		return
	case p == nil: // nobody knows whether it is claimed
		c.persist(live, c.notMade(row.id, row.attempts+1))
		return
	case err != nil:
		c.settleParked(live, p, failed, Reject(err))
		return
	case p.attempt > c.cfg.MaxAttempts:
		p.attempt-- // it is not made
		c.settleParked(live, p, failed, Reject(errors.New("the last attempt did not come to an end: did the process die?")))
		return
	}
	if err := c.prepare(ctx, &p.item); err != nil {
		v := failed
		if ctx.Err() != nil {
			v = stopped
		}
		c.settleParked(live, p, v, err)
		return
	}
	unpark := statement{unparkSQL(c.cfg.Schema), []any{p.id, p.token}}
	r := c.apply(ctx, live, unit{[]*item{&p.item}, &unpark})
	switch {
	case r.verdict == applied && (p.fate == handled || p.unsure):
		failpoint.Hit("inbox/unparked")
		c.count(func(s *Stats) { s.Applied++ })
		c.unblock(ctx, p.envelope)
	case r.verdict != applied:
		c.settleParked(live, p, r.verdict, r.err)
	}
}

// claimParked counts the attempt before it is made, so that a message which kills the
// process does not do so for ever, and puts the row off until it must be over.
// It returns nil if the row is not to be had; an error of what is in it with it.
func (c *Consumer) claimParked(ctx context.Context, row dueRow) (*parkedMessage, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	p := &parkedMessage{id: row.id}
	var properties, headers []byte
	over := 2*c.cfg.Timeout + 3*callTimeout // Before and the Handler
	err := c.db.QueryRow(ctx, claimSQL(c.cfg.Schema), unplanned, row.id, over.Seconds(), row.attempts).Scan(&p.token, &properties, &headers, &p.body)
	if err != nil {
		return nil, err
	}
	failpoint.Hit("inbox/claimed")
	p.attempt = p.token
	if p.properties, err = unpack(properties); err != nil {
		return p, err
	}
	p.headers, err = unpack(headers)
	return p, err
}

// settleParked ends a claimed attempt that did not apply the message. If the row is not
// there any more, somebody else has settled it.
func (c *Consumer) settleParked(live context.Context, m *parkedMessage, v verdict, err error) {
	if v == stopped {
		c.persist(live, c.notMade(m.id, m.token))
		return
	}
	p := c.judge(err, m.attempt)
	c.count(func(s *Stats) { s.Failures++ })
	c.sayFailure(m.envelope.id(), p.reason, m.attempt, err)
	s := statement{settleSQL(c.cfg.Schema), []any{m.id, m.token, p.reason, p.attempts, lastError(err), p.delay.Seconds()}}
	if v == ended {
		s = statement{parkEndedAgainSQL(c.cfg.Schema), append(c.parkArgs(m.envelope, p), m.id)}
	}
	if rows, ok := c.persist(live, s); ok && rows > 0 {
		c.parked(p.reason)
	}
}

// notMade gives a claimed attempt back. If another consumer has claimed that one, its
// transaction finds so: at worst an attempt more is made.
func (c *Consumer) notMade(id int64, token int) statement {
	return statement{settleSQL(c.cfg.Schema), []any{id, token, reasonRetry, token - 1, nil, 0.0}}
}
