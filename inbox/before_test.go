package inbox_test

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/txbox/txbox/inbox"
	"github.com/txbox/txbox/internal/testenv"
)

func TestBeforeRunsOutsideTheTransactionAndItsResultReachesTheHandler(t *testing.T) {
	t.Parallel()
	b := setupBroker(t)
	type receipt struct{}
	var calls atomic.Int64
	cfg := b.config(t)
	cfg.Before = func(ctx context.Context, m inbox.Message) (context.Context, error) {
		if n := b.count(t, "inbox", "message_id = $1", m.ID); n != 0 && m.Attempt == 1 {
			return nil, errors.New("it is recorded already")
		}
		switch call := calls.Add(1); {
		case m.ID == "1" && m.Attempt == 1:
			return nil, errTest
		case m.ID == "2" && m.Attempt == 1:
			panic("two")
		default:
			return context.WithValue(ctx, receipt{}, fmt.Sprint(m.ID, " paid, call ", call > 0)), nil
		}
	}
	b.publish(t, numbered(3)...)
	c := b.run(t, b.Pool, testenv.AMQPURL(t), func(ctx context.Context, tx pgx.Tx, m inbox.Message) error {
		if got := ctx.Value(receipt{}); got != fmt.Sprint(m.ID, " paid, call ", true) {
			return inbox.Reject(fmt.Errorf("the receipt is %v", got))
		}
		return b.apply(ctx, tx, m)
	}, cfg)
	c.waitFor(t, "all applied", func(s inbox.Stats) bool { return s.Applied == 3 && s.Failures == 2 })
	before := calls.Load()
	b.publish(t, numbered(3)...)
	c.waitFor(t, "duplicates dropped", func(s inbox.Stats) bool { return s.Duplicates == 3 })
	if calls.Load() != before {
		t.Error("Before was called for a duplicate")
	}
	c.stop()
	b.wantOneEffectEach(t, 3)
}
