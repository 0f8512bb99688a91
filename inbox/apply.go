package inbox

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"
)

// work handles messages until ctx ends. What is in hand then may use workCtx to
// the end.
func (c *Consumer) work(ctx, workCtx context.Context, own <-chan *delivery) {
	shared := c.queues[c.cfg.Workers]
	for {
		select {
		case <-ctx.Done():
			return
		case d := <-own:
			c.deliver(workCtx, d)
		case d := <-shared:
			c.deliver(workCtx, d)
		case id := <-c.due:
			c.handleAgain(ctx, workCtx, id)
		}
	}
}

// deliver sees to it that a delivery is recorded with its effects, or parked, and
// acknowledges it after that.
func (c *Consumer) deliver(ctx context.Context, d *delivery) {
	if d.live.Err() != nil {
		return
	}
	e := newEnvelope(&d.Delivery)
	if c.settleDelivery(ctx, d.live, e) {
		// An error is the end of the channel: RabbitMQ delivers it again, and it is a
		// duplicate then.
		_ = d.Ack(false)
	}
}

// settleDelivery reports whether the message is on record, as applied or parked.
func (c *Consumer) settleDelivery(ctx, live context.Context, e envelope) bool {
	if err := checkName("message_id", e.id(), maxMessageID); err != nil {
		return c.parkUnusable(live, e, err)
	}
	claim := []statement{{recordSQL(c.cfg.Schema), []any{c.cfg.Name, e.id(), e.digest()}}}
	if key := e.storableKey(); key != nil {
		claim = append(claim, statement{blockedSQL(c.cfg.Schema), []any{c.cfg.Name, *key}})
	}
	v, err := c.apply(ctx, live, claim, e, 1)
	switch v {
	case applied:
		c.count(func(s *Stats) { s.Applied++ })
		return true
	case taken:
		c.count(func(s *Stats) { s.Duplicates++ })
		return true
	case failed, ended, blocked:
		return c.park(live, e, v, err)
	}
	return false
}

// A verdict is what became of one run of a message's transaction.
type verdict int

const (
	applied verdict = iota // committed
	taken                  // not ours: a duplicate, or another has the parked row
	blocked                // an earlier message of its key is parked; the handler did not run
	away                   // there was no transaction to be had; the handler did not run
	again                  // rolled back, or of unknown outcome, through no fault of the handler
	failed                 // rolled back: the handler failed
	ended                  // the handler ended the transaction; see ErrTxEnded
	stopped                // rolled back: the consumer stops, or the delivery has lapsed
)

// apply runs the message's transaction until there is a verdict to act on. A
// database that is away is waited for; other failures that are not the
// handler's get maxRuns. It stops waiting when live ends.
func (c *Consumer) apply(ctx, live context.Context, claim []statement, e envelope, attempt int) (verdict, error) {
	wait := runBackOff()
	unknown := false
	for run := 1; ; {
		v, err := c.run(ctx, claim, e.message(attempt))
		switch {
		case v == taken && unknown:
			return applied, nil
		case v == again && run == maxRuns:
			return failed, fmt.Errorf("in vain %d times: %w", maxRuns, err)
		case v == again:
			unknown = unknown || errors.Is(err, ErrCommitUnknown)
			run++
		case v != away:
			return v, err
		}
		if !sleep(live, wait.NextBackOff()) {
			return stopped, err
		}
	}
}

// run runs the message's transaction once: the claim, the handler, COMMIT. The
// first statement of the claim affects one row if the message is ours to handle;
// a second one finds a row if it has to wait behind another.
func (c *Consumer) run(ctx context.Context, claim []statement, m Message) (verdict, error) {
	callCtx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	tx, rows, err := begin(callCtx, c.db, append([]statement{c.settings()}, claim...)...)
	c.reportDatabase(ctx, err)
	if err != nil {
		return away, err
	}
	defer rollback(ctx, tx)
	switch {
	case rows[1] == 0:
		return taken, nil
	case len(rows) > 2 && rows[2] > 0:
		return blocked, errBehind
	}
	if v, err := c.call(ctx, tx, m); v != applied {
		return v, err
	}
	commitCtx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	err = commit(commitCtx, tx)
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

// lockTimeout is shorter than callTimeout, so that a twin that holds the ID costs
// a statement and not a connection.
const lockTimeout = callTimeout / 2

func (c *Consumer) settings() statement {
	ms := func(d time.Duration) string { return strconv.FormatInt(d.Milliseconds(), 10) }
	return statement{settingsSQL, []any{ms(lockTimeout), ms(c.cfg.Timeout + callTimeout), ms(callTimeout)}}
}

// call calls the handler and judges what it did; applied is yet to be committed.
func (c *Consumer) call(ctx context.Context, tx pgx.Tx, m Message) (verdict, error) {
	handlerCtx, cancel := context.WithTimeout(ctx, c.cfg.Timeout)
	defer cancel()
	guarded := newGuard(tx)
	err := guarded.check(c.handle(handlerCtx, guarded, m))
	late := handlerCtx.Err() != nil
	switch {
	case err == nil:
		return applied, nil
	case errors.Is(err, ErrTxEnded):
		return ended, err
	case ctx.Err() != nil:
		return stopped, err
	case isDeliberate(err):
		return failed, err
	case isConflict(err):
		return again, err
	case late:
		return failed, fmt.Errorf("not done after %s: %w", c.cfg.Timeout, err)
	case tx.Conn().IsClosed():
		return again, err
	}
	return failed, err
}

// handle calls the handler and makes an error of its panic. It does so in a
// goroutine that the handler may end.
func (c *Consumer) handle(ctx context.Context, tx pgx.Tx, m Message) error {
	result := make(chan error, 1)
	go func() {
		err := errors.New("the handler ended its goroutine, by runtime.Goexit or the FailNow of a test")
		defer func() {
			if reason := recover(); reason != nil {
				err = fmt.Errorf("panic: %v\n\n%s", reason, debug.Stack())
			}
			result <- err
		}()
		err = sound(c.handler(ctx, tx, m))
	}()
	return <-result
}

// reportDatabase notes whether the database could be worked with. A lock or
// conflict is no news of the database, nor is the end of ctx.
func (c *Consumer) reportDatabase(ctx context.Context, err error) {
	switch {
	case err == nil:
		c.report(&c.database, nil)
	case !isConflict(err) && sqlState(err) != "55P03" && ctx.Err() == nil:
		c.report(&c.database, &waiting{"the database", err})
	}
}
