package relay

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/txbox/txbox/internal/servers/serverstest"
	"github.com/txbox/txbox/internal/testenv"
)

// The broker closes each connection that opens a channel: its user may have none.
// Nothing was sent on them, so no message is to blame, and they are not dialled
// without pause.
func TestRefusedChannelsBlameNobodyAndAreNotAskedForWithoutPause(t *testing.T) {
	t.Parallel()
	broker, db := serverstest.RabbitMQ(t), testenv.Schema(t)
	const user, password = "limited", "secret"
	for _, args := range [][]string{
		{"add_user", user, password}, {"set_permissions", user, ".*", ".*", ".*"}, {"set_user_limits", user, `{"max-channels":0}`},
	} {
		if _, err := broker.Ctl(testenv.Context(t), args...); err != nil {
			t.Fatal(err)
		}
	}
	var dialled atomic.Int64
	pub, err := RabbitMQ(broker.URL(), RabbitMQConfig{Credentials: func(context.Context) (string, string, error) {
		dialled.Add(1)
		return user, password, nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	r, err := New(db.Pool, pub, Config{Schema: db.Schema, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(testenv.Context(t), 10*time.Second)
	defer cancel()
	m := newMessage(1, "", "q")
	r.isolateOne(ctx, ctx, group{messages: []*message{m}, alone: 1, through: -1})
	if got := r.isolation.clear(); len(got) != 1 || r.Stats().Refused != 0 || dialled.Load() != 1 {
		t.Errorf("%d messages left, %d refused, after %d connections", len(got), r.Stats().Refused, dialled.Load())
	}

	r.hand.admit([]*message{m})
	r.hand.take(1)
	m.alone = true
	r.hand.retry(m)
	probeCtx, stop := context.WithTimeout(ctx, 3*time.Second)
	defer stop()
	var probing sync.WaitGroup
	for i := range probers {
		probing.Go(func() { r.probe(probeCtx, probeCtx, i < probers/2) })
	}
	probing.Wait()
	if n := dialled.Load(); n < 3 || n > 150 {
		t.Errorf("%d connections", n)
	}
}
